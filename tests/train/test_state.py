"""The optimizer against its definition: schedule, clipping, masked weight decay, EMA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitdance_jax.config import ConfigError, MeshConfig, OptimizerConfig
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.train.state import init_state, learning_rate_schedule, make_optimizer
from bitdance_jax.train.step import make_train_step
from bitdance_jax.train.task import Objective


MESH = make_mesh(MeshConfig(), jax.devices()[:1])


def rates(config: OptimizerConfig, steps: int) -> np.ndarray:
    schedule = learning_rate_schedule(config, steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


def test_warm_up_then_constant():
    got = rates(OptimizerConfig(learning_rate=0.5, warmup_steps=4, schedule="constant"), 8)
    np.testing.assert_allclose(got, [0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize("decay_start", [None, 6])
def test_warm_up_then_cosine_to_the_last_step(decay_start):
    """The default, as in the release."""
    got = rates(
        OptimizerConfig(
            learning_rate=0.5, warmup_steps=4, end_learning_rate=0.1, decay_start=decay_start
        ),
        10,
    )
    start = decay_start or 4
    np.testing.assert_allclose(got[4 : start + 1], 0.5, rtol=1e-6)
    wave = 0.1 + 0.4 * 0.5 * (1 + np.cos(np.pi * np.arange(11 - start) / (10 - start)))
    np.testing.assert_allclose(got[start:], wave, rtol=1e-5)


def test_no_warm_up_starts_at_the_peak():
    np.testing.assert_allclose(
        rates(OptimizerConfig(learning_rate=0.5, warmup_steps=0, schedule="constant"), 3), 0.5
    )


def test_decay_before_the_end_of_the_warm_up_is_an_error():
    with pytest.raises(ConfigError, match="decay_start must not be before"):
        learning_rate_schedule(OptimizerConfig(warmup_steps=10, decay_start=5), 100)


class LinearObjective(Objective):
    """The gradient of every parameter is the batch's scale."""

    def init(self, key):
        return PARAMS

    def loss(self, params, frozen, batch, keys):
        return sum((batch["scale"].mean() * x).sum() for x in jax.tree.leaves(params)), {}

    def abstract_batch(self, batch_size):
        return {"scale": jax.ShapeDtypeStruct((batch_size,), jnp.float32)}

    def no_decay(self, path):
        return path == ("class_embedding", "embedding")


PARAMS = {
    "layers": {
        "norm": {"scale": jnp.full((2, 3), 2.0)},
        "w1": {"kernel": jnp.full((2, 3, 2, 3), 2.0), "bias": jnp.full((2, 2, 3), 2.0)},
    },
    "class_embedding": {"embedding": jnp.full((4, 3), 2.0)},
    "out": {"kernel": jnp.full((3, 2), 2.0), "bias": jnp.full(2, 2.0)},
}


def one_step(config: OptimizerConfig, scale: float = 1.0):
    objective = LinearObjective()
    schedule = learning_rate_schedule(config, 10)
    optimizer = make_optimizer(config, schedule, objective)
    step = make_train_step(
        objective,
        optimizer,
        schedule,
        mesh=MESH,
        ema_decay=config.ema_decay,
        ema_warmup=config.ema_warmup,
    )
    ema = config.ema_decay is not None
    state = jax.jit(lambda key: init_state(objective, optimizer, key, ema=ema))(jax.random.key(0))
    return step(state, {}, {"scale": jnp.full(2, scale)}, jax.random.key(0))


def test_weight_decay_skips_what_it_must():
    """Adam's first step is learning_rate x sign(gradient); decay takes learning_rate x weight_decay
    x weight besides."""
    state, _ = one_step(
        OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5, clip_norm=None)
    )
    expected = jax.tree.map(lambda x: 2.0 - 0.1, PARAMS)
    expected["layers"]["w1"]["kernel"] = expected["out"]["kernel"] = 2.0 - 0.1 - 0.1 * 0.5 * 2
    jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x, rtol=1e-5), expected, state.params)


def test_ema_starts_from_the_initial_weights():
    state, _ = one_step(
        OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.0, ema_decay=0.75)
    )
    jax.tree.map(lambda x: np.testing.assert_allclose(x, 2.0 - 0.25 * 0.1, rtol=1e-5), state.ema)
    assert {x.dtype for x in jax.tree.leaves(state.ema)} == {jnp.dtype("float32")}
    assert int(state.step) == 1


@pytest.mark.parametrize(("decay", "used"), [(0.75, 0.1), (0.05, 0.05)])
def test_ema_warmup_begins_with_small_decays(decay, used):
    """The first decay is 1 / 10, where ema_decay is larger."""
    state, _ = one_step(
        OptimizerConfig(
            learning_rate=0.1, warmup_steps=0, weight_decay=0.0, ema_decay=decay, ema_warmup=True
        )
    )
    expected = 2.0 - (1 - used) * 0.1
    jax.tree.map(lambda x: np.testing.assert_allclose(x, expected, rtol=1e-5), state.ema)


def test_without_ema_the_result_is_the_parameters():
    state, _ = one_step(OptimizerConfig(learning_rate=0.1, warmup_steps=0, ema_decay=None))
    assert state.ema == {}
    assert state.result is state.params


def test_epsilon_keeps_small_gradients_from_full_steps():
    """Adam's first step is learning_rate x gradient / (|gradient| + eps)."""
    options = {"learning_rate": 0.1, "warmup_steps": 0, "weight_decay": 0.0, "clip_norm": None}
    for eps, share in ((1e-8, 0.5), (1e-15, 1.0)):
        state, _ = one_step(OptimizerConfig(eps=eps, **options), scale=1e-8)
        np.testing.assert_allclose(state.params["out"]["bias"], 2.0 - 0.1 * share, rtol=1e-3)


def test_clipping_acts_on_the_moments_and_the_norm_is_logged_unclipped():
    count = sum(x.size for x in jax.tree.leaves(PARAMS))
    state, metrics = one_step(OptimizerConfig(warmup_steps=0, clip_norm=1.0), scale=3.0)
    np.testing.assert_allclose(metrics["grad_norm"], 3 * count**0.5, rtol=1e-5)
    first_moment = state.opt_state[1][0].mu["out"]["bias"]
    np.testing.assert_allclose(first_moment, 0.1 / count**0.5, rtol=1e-5)


def test_the_step_gives_up_the_old_state(toy):
    task, config = toy.ToyTask(), toy.training_config("", 10).optimizer
    schedule = learning_rate_schedule(config, 10)
    optimizer = make_optimizer(config, schedule, task.objective)
    step = make_train_step(
        task.objective, optimizer, schedule, mesh=MESH, ema_decay=config.ema_decay
    )
    state = jax.jit(lambda key: init_state(task.objective, optimizer, key))(jax.random.key(0))
    step(state, {}, next(task.batches(np.arange(task.batch_size))), jax.random.key(1))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
