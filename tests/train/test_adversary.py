"""A tokenizer trained against a discriminator: its state, meshes, the start, both stages."""

import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

from bitdance_jax.config import (
    DiscriminatorConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TokenizerConfig,
    TokenizerLossConfig,
)
from bitdance_jax.data.config import DataConfig
from bitdance_jax.distributed import sharding
from bitdance_jax.distributed.mesh import make_mesh, put_batch
from bitdance_jax.errors import ConfigError, UserError
from bitdance_jax.io import model_folder, model_lookup
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.tokenizer.discriminator import PatchDiscriminator, smallest_side
from bitdance_jax.train.checkpoint import Checkpoints
from bitdance_jax.train.initial import initial_params
from bitdance_jax.train.loop import train
from bitdance_jax.train.state import (
    TrainState,
    abstract_state,
    init_state,
    learning_rate_schedule,
    make_optimizer,
)
from bitdance_jax.train.step import make_train_step
from bitdance_jax.train.tokenizer_training import TokenizerTraining
from bitdance_jax.train.tokenizer_weights import PERCEPTUAL_NETWORKS, PerceptualNetwork


SIDE = 16
BATCH = 8
CONFIG = TokenizerTraining(
    run=RunConfig(workdir="", steps=10),
    model=TokenizerConfig(bits=8, ch=32, ch_mult=(1, 1), num_res_blocks=1, num_codebooks=1),
    image_size=SIDE,
    data=DataConfig(batch_size=BATCH),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0, schedule="constant"),
    loss=TokenizerLossConfig(
        l1=1.0,
        l2=0.0,
        adversarial=0.5,
        discriminator=DiscriminatorConfig(filters=8, layers=1, adaptive=True),
    ),
)


class Run:
    """Steps of a config on a mesh."""

    def __init__(self, config: TokenizerTraining, mesh_config: MeshConfig = MeshConfig()) -> None:
        count = abs(mesh_config.data * mesh_config.fsdp * mesh_config.tensor)
        self.mesh = make_mesh(mesh_config, jax.devices()[:count])
        self.objective = config.make_objective()
        schedule = learning_rate_schedule(config.optimizer, config.run.steps)
        self.optimizer = make_optimizer(config.optimizer, schedule, self.objective)
        self._step = make_train_step(
            self.objective, self.optimizer, schedule, mesh=self.mesh, ema_decay=0.99
        )

    def init(self) -> TrainState:
        places = sharding.shardings(
            self.mesh,
            abstract_state(self.objective, self.optimizer, self.mesh),
            self.objective.sharding_rules,
        )
        init = jax.jit(
            lambda key: init_state(self.objective, self.optimizer, key), out_shardings=places
        )
        return init(jax.random.key(0))

    def steps(self, state: TrainState, first: int, last: int) -> tuple[TrainState, list[dict]]:
        metrics = []
        for number in range(first, last):
            rng = np.random.default_rng(number)
            batch = {
                "image": rng.integers(0, 256, (BATCH, SIDE, SIDE, 3)).astype(np.uint8),
                "label": np.zeros(BATCH, np.int32),
            }
            batch = put_batch(self.mesh, batch, BATCH)
            state, found = self._step(state, {}, batch, jax.random.key(1))
            metrics.append(jax.device_get(found))
        return state, metrics


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(CONFIG)


@pytest.fixture(scope="module")
def trained(run):
    """States after 0 and 4 steps on the host, and the metrics between."""
    state = run.init()
    before = jax.device_get(state)
    state, metrics = run.steps(state, 0, 4)
    return before, jax.device_get(state), metrics


def test_both_players_move(trained):
    before, after, metrics = trained
    for part in ("params", "batch_stats"):
        changed = jax.tree.map(
            lambda a, b: bool(np.any(a != b)), before.auxiliary[part], after.auxiliary[part]
        )
        assert all(jax.tree.leaves(changed)), part
    assert after.auxiliary["logit_means"].real != 0
    assert {"adversarial", "discriminator_loss", "logits_real", "logits_fake"} <= metrics[0].keys()
    assert all(np.isfinite(value) for found in metrics for value in found.values())


@pytest.mark.slow(6)
def test_a_discriminator_alone_learns_to_tell_them_apart():
    """Against a tokenizer that hardly changes."""
    optimizer = dataclasses.replace(CONFIG.optimizer, learning_rate=1e-9)
    discriminator = DiscriminatorConfig(filters=8, layers=1, learning_rate=3e-3)
    loss = dataclasses.replace(CONFIG.loss, discriminator=discriminator)
    run = Run(dataclasses.replace(CONFIG, optimizer=optimizer, loss=loss))
    _, metrics = run.steps(run.init(), 0, 40)
    assert metrics[-1]["discriminator_loss"] < 0.3 * metrics[0]["discriminator_loss"]
    assert metrics[-1]["logits_real"] > 0.5 > -0.5 > metrics[-1]["logits_fake"]


def test_resuming_is_exact(run, trained, tmp_path):
    state, _ = run.steps(run.init(), 0, 2)
    with Checkpoints(str(tmp_path / "checkpoints"), keep=1) as checkpoints:
        checkpoints.save(2, state, {"next_batch": 2})
        checkpoints.wait()
        restored = checkpoints.restore(abstract_state(run.objective, run.optimizer, run.mesh))
    assert restored is not None
    state, _ = run.steps(restored[0], 2, 4)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), trained[1])


@pytest.mark.slow(10)
def test_before_the_start_there_is_no_adversary():
    late = dataclasses.replace(CONFIG.loss.discriminator, start=2)
    loss = dataclasses.replace(CONFIG.loss, discriminator=late)
    run = Run(dataclasses.replace(CONFIG, loss=loss))
    plain = Run(dataclasses.replace(CONFIG, loss=dataclasses.replace(CONFIG.loss, adversarial=0.0)))
    state = run.init()
    first = jax.device_get(state.auxiliary)
    state, _ = run.steps(state, 0, 2)
    without, _ = plain.steps(plain.init(), 0, 2)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.auxiliary), first)
    for ours, expected in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(without.params), strict=True
    ):
        np.testing.assert_allclose(ours, expected, atol=1e-6)
    state, _ = run.steps(state, 2, 3)
    moved = jax.tree.map(
        lambda a, b: bool(np.any(a != b)), state.auxiliary["params"], first["params"]
    )
    assert all(jax.tree.leaves(moved))


def test_the_adaptive_weight_balances_gradients_at_the_last_layer(run):
    objective = run.objective
    state = run.init()
    rng = np.random.default_rng(0)
    batch = {"image": jnp.asarray(rng.integers(0, 256, (BATCH, SIDE, SIDE, 3)), jnp.uint8)}
    keys = jax.random.split(jax.random.key(0), BATCH)

    def gradient(weight_of_adversary: float) -> np.ndarray:
        """At the decoder's last kernel, of the L1 loss and the adversarial one with this weight."""
        model = Autoencoder(CONFIG.model)
        images = jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1
        term = objective._adversary.generator_term(state.auxiliary)

        def loss(params):
            reconstruction, _ = model.apply({"params": params}, images)
            l1 = jnp.mean(jnp.abs(reconstruction - images))
            return (l1 if weight_of_adversary == 0 else 0) + weight_of_adversary * term(
                reconstruction
            )

        return jax.jit(jax.grad(loss))(state.params)["decoder"]["conv_out"]["kernel"]

    expected = np.linalg.norm(gradient(0.0)) / np.linalg.norm(gradient(1.0))
    weight = jax.jit(objective._adaptive_weight)(state.params, state.auxiliary, {}, batch, keys)
    np.testing.assert_allclose(weight, expected, rtol=0.02)


def test_micro_batches_are_refused():
    with pytest.raises(ConfigError, match="accumulate"):
        dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, accumulate=2))


@pytest.mark.slow(15)
def test_the_second_stage(tmp_path):
    """A plain tokenizer becomes one with a GAN decoder: same images at first, the encoder stays."""
    plain = dataclasses.replace(
        CONFIG,
        run=RunConfig(workdir=str(tmp_path / "plain"), steps=2, preview_every=100),
        loss=TokenizerLossConfig(),
    )
    train(plain.make_task(), plain)
    first = str(tmp_path / "plain" / "model")
    stage2 = dataclasses.replace(
        CONFIG,
        run=RunConfig(workdir=str(tmp_path / "gan"), steps=2, preview_every=2),
        model=dataclasses.replace(CONFIG.model, decoder="gan"),
        init=first,
        train_encoder=False,
    )
    given = initial_params(stage2)
    assert set(given) == {"decoder"}
    given = jax.tree.map(jnp.asarray, given)
    plain_params = jax.tree.map(jnp.asarray, model_folder.load(first).params)
    codes = jnp.where(jax.random.bernoulli(jax.random.key(0), shape=(1, 4, 4, 8)), 1.0, -1.0)
    noise = jax.random.normal(jax.random.key(1), codes.shape)

    def decode(config: TokenizerConfig, params: dict, *inputs: jax.Array) -> jax.Array:
        apply = functools.partial(Autoencoder(config).apply, method="decode")
        return jax.jit(apply)({"params": params}, *inputs)

    expected = decode(plain.model, plain_params, codes)
    ours = decode(stage2.model, given, codes, noise)
    np.testing.assert_allclose(ours, expected, atol=1e-5)

    train(stage2.make_task(), stage2, initial=initial_params(stage2))
    params = model_folder.load(str(tmp_path / "gan" / "model")).params
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], plain_params["encoder"])
    assert np.any(params["decoder"]["conv_in"]["kernel"][:, :, 8:] != 0)
    with pytest.raises(ConfigError, match="init"):
        dataclasses.replace(stage2, init=None)

    # An unfinished run is a tokenizer too, with the encoder of its first stage.
    shutil.rmtree(tmp_path / "gan" / "model")
    unfinished = model_lookup.load(tmp_path / "gan").params
    jax.tree.map(np.testing.assert_array_equal, unfinished, params)
    # The encoder of an unfinished first stage would change until the second resumes.
    shutil.rmtree(first)
    with pytest.raises(UserError, match="not finished"):
        dataclasses.replace(stage2, init=str(tmp_path / "plain")).make_task()


@pytest.mark.parametrize(
    ("loss", "side"),
    [
        (TokenizerLossConfig(perceptual=1.0), 16),
        (TokenizerLossConfig(perceptual=1.0, perceptual_network="efficientnet"), 2),
        (TokenizerLossConfig(adversarial=1.0), 24),
        (TokenizerLossConfig(adversarial=1.0, discriminator=DiscriminatorConfig(layers=1)), 6),
    ],
)
def test_images_that_are_too_small_for_a_network(loss, side):
    """Their losses would be NaN, or without any logits."""
    assert dataclasses.replace(CONFIG, loss=loss, image_size=side).image_size == side
    if side > 2:
        with pytest.raises(ConfigError, match="image_size"):
            dataclasses.replace(CONFIG, loss=loss, image_size=side - 2)


def test_images_are_rgb():
    model = dataclasses.replace(CONFIG.model, image_channels=1)
    with pytest.raises(ConfigError, match="image_channels"):
        dataclasses.replace(CONFIG, model=model)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_smallest_image_has_one_logit(layers):
    def logits(side: int):
        model = PatchDiscriminator(8, layers)
        init = functools.partial(model.init_with_output, jax.random.key(0))
        return jax.eval_shape(init, jnp.zeros((1, side, side, 3)))[0]

    assert logits(smallest_side(layers)).shape == (1, 1, 1)
    assert logits(smallest_side(layers) - 1).size == 0


def on_eight_devices() -> None:
    """Batch statistics are those of the complete batch on any mesh.

    Adam's first steps move parameters by the sign of their gradients, which rounding decides for
    those that are 0 but for it: with a warm-up, by little.
    """
    optimizer = dataclasses.replace(CONFIG.optimizer, warmup_steps=1000)
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    expected = None
    for mesh in (MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)):
        run = Run(config, mesh)
        _, metrics = run.steps(run.init(), 0, 4)
        values = [[found[name] for name in ("loss", "discriminator_loss")] for found in metrics]
        if expected is None:
            expected = values
        np.testing.assert_allclose(values, expected, rtol=2e-4, err_msg=str(mesh))


@pytest.mark.slow(20)
def test_the_mesh_does_not_matter():
    processes.python([__file__], Path(__file__).parent, devices=8)


def gradients(values: jax.Array, images: jax.Array) -> jax.Array:
    """A perceptual distance for tests: of the differences of neighbouring pixels."""
    across, down = (
        jnp.square(jnp.diff(values, axis=axis) - jnp.diff(images, axis=axis)) for axis in (1, 2)
    )
    return jnp.mean(across, axis=(1, 2, 3)) + jnp.mean(down, axis=(1, 2, 3))


@pytest.mark.slow
def test_bfloat16_with_every_term(monkeypatch):
    """Losses, adaptive weight and gradients are those of float32 but for rounding."""
    network = PerceptualNetwork(
        lambda params, values, images: gradients(values, images), dict, lambda path: {}, 1
    )
    monkeypatch.setitem(PERCEPTUAL_NETWORKS, "efficientnet", network)
    loss = dataclasses.replace(
        CONFIG.loss, perceptual=1.0, perceptual_network="efficientnet", commitment=0.25, entropy=0.0
    )
    # Smooth images, of which few bits are near their threshold.
    rows, columns = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    phases = np.arange(BATCH * 3).reshape(BATCH, 1, 1, 3)
    waves = np.sin(rows[..., None] / 4 + phases) * np.cos(columns[..., None] / 5 - phases)
    batch = {"image": jnp.asarray(127.5 + 120 * waves, jnp.uint8)}
    keys = jax.random.split(jax.random.key(0), BATCH)

    def step(dtype):
        run_config = dataclasses.replace(CONFIG.run, compute_dtype=dtype)
        objective = dataclasses.replace(CONFIG, loss=loss, run=run_config).make_objective()
        params = objective.init(jax.random.key(0))
        auxiliary = objective.init_auxiliary(jax.random.key(1))
        frozen = {"perceptual": {}}

        def losses(params):
            return objective.auxiliary_loss(params, auxiliary, frozen, batch, keys, jnp.int32(0))

        gradient = jax.jit(jax.value_and_grad(losses, has_aux=True))
        (value, (metrics, _)), found = jax.device_get(gradient(params))
        # The weight of the adversary is adaptive; what remains of the loss is that term.
        rest = metrics["l1"] + metrics["perceptual"] + 0.25 * metrics["commitment"]
        return found, metrics | {"weighted_adversarial": value - rest}

    exact, expected = step("float32")
    rounded, metrics = step("bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(rounded)} == {"float32"}
    for name, value in metrics.items():
        assert value == pytest.approx(expected[name], rel=0.1, abs=0.01), name
    assert abs(expected["weighted_adversarial"]) > 0.05
    for part in ("encoder", "decoder"):
        ours, theirs = (
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree[part])])
            for tree in (rounded, exact)
        )
        cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
        assert cosine > 0.97, (part, cosine)


if __name__ == "__main__":
    on_eight_devices()
