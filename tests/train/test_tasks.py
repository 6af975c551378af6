"""The two tasks at toy size on the emoji: training, previews, metrics and exported models."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from random_params import random_params

import bitdance_jax
from bitdance_jax.config import (
    AugmentConfig,
    ClassConditionalConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    SamplerConfig,
    to_dict,
)
from bitdance_jax.data.config import DataConfig
from bitdance_jax.data.sources import EmojiSource
from bitdance_jax.data.tokens import TokensSource, Versions
from bitdance_jax.data.transforms import centre_crop
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.errors import UserError
from bitdance_jax.evaluate.psnr import psnr
from bitdance_jax.io import image_files, model_folder
from bitdance_jax.models import class_conditional
from bitdance_jax.models.class_conditional import PatchReader
from bitdance_jax.nn.stack import unstack
from bitdance_jax.sampling import next_patch
from bitdance_jax.sampling.solvers import EulerMaruyama
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.train import class_conditional_training
from bitdance_jax.train.class_conditional_training import (
    ClassConditionalTask,
    ClassConditionalTraining,
)
from bitdance_jax.train.evaluation import Evaluation
from bitdance_jax.train.state import init_state, make_optimizer
from bitdance_jax.train.step import make_train_step
from bitdance_jax.train.task import Batches, Objective, Task
from bitdance_jax.train.tokenizer_training import (
    TokenizerObjective,
    TokenizerTask,
    TokenizerTraining,
)


SIZE = 16
STEPS = 40
ROWS = np.arange(16)
MESH = make_mesh(MeshConfig(), jax.devices()[:1])


def train(task, learning_rate, steps=STEPS):
    """The state after some steps at a constant rate, and the loss of each."""
    objective, schedule = task.objective, optax.constant_schedule(learning_rate)
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.0), schedule, objective)
    step = make_train_step(objective, optimizer, schedule, MESH, ema_decay=0.9)
    state = jax.jit(partial(init_state, objective, optimizer))(jax.random.key(0))
    batches, losses = task.batches(ROWS), []
    for _ in range(steps):
        state, metrics = step(state, task.frozen, next(batches), jax.random.key(1))
        losses.append(float(metrics["loss"]))
    return state, losses


def evaluate(task, params):
    return Evaluation(task, task.frozen, MESH).metrics(params)


def gradient_dtypes(task, params):
    keys, batch = jax.random.split(jax.random.key(0), 16), task.objective.abstract_batch(16)
    gradients, _ = jax.eval_shape(
        jax.grad(task.objective.loss, has_aux=True), params, task.frozen, batch, keys
    )
    return dtypes(gradients)


def dtypes(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


def replace_run(config, **changes):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **changes))


# The tokenizer


TOKENIZER = TokenizerTraining(
    run=RunConfig(workdir="unused", steps=STEPS),
    model=tiny_models.TOKENIZER,
    image_size=SIZE,
    data=DataConfig(batch_size=16, augment=AugmentConfig(min_crop=0.9)),
)


@pytest.fixture(scope="module")
def tokenizer_task():
    return TokenizerTask(TOKENIZER)


@pytest.fixture(scope="module")
def trained_tokenizer(tokenizer_task):
    return train(tokenizer_task, 3e-3)


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer_task, trained_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    tokenizer_task.export(
        trained_tokenizer[0].ema,
        str(folder),
        step=STEPS,
        metrics=evaluate(tokenizer_task, trained_tokenizer[0].ema),
    )
    return folder


@pytest.fixture(scope="module")
def held_out():
    return np.stack([centre_crop(record["image"], SIZE) for record in EmojiSource("heldout")])


def test_make_task(tokenizer_task):
    assert isinstance(TOKENIZER.make_task(), TokenizerTask)
    assert isinstance(tokenizer_task, Task) and isinstance(tokenizer_task.batches(ROWS), Batches)
    assert isinstance(tokenizer_task.objective, Objective)
    assert tokenizer_task.steps_per_epoch == 1806 / 16


def test_the_tokenizer_learns(trained_tokenizer):
    state, losses = trained_tokenizer
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    assert dtypes((state.params, state.ema)) == {"float32"}


def test_batches_are_what_the_objective_expects(tokenizer_task, task, uncached_task):
    for each in (tokenizer_task, task, uncached_task):
        for batch in (next(each.batches(ROWS)), next(each.held_out(ROWS))):
            assert jax.eval_shape(lambda x: x, batch) == each.objective.abstract_batch(16)
        assert jax.eval_shape(lambda x: x, each.frozen) == each.objective.abstract_frozen()
        mine = next(each.batches(np.array([3, 4])))
        jax.tree.map(
            lambda x, y: np.testing.assert_array_equal(x, y[3:5]), mine, next(each.batches(ROWS))
        )


def test_psnr_of_the_task_and_of_the_exported_folder_agree(
    tokenizer_task, trained_tokenizer, tokenizer_folder, held_out
):
    """Measured on the first 96 held-out images (six batches) by the run, and outside of it."""
    metrics = evaluate(tokenizer_task, trained_tokenizer[0].ema)
    assert metrics == evaluate(tokenizer_task, trained_tokenizer[0].ema)
    assert 8 < metrics["psnr"] < 30
    tokenizer = bitdance_jax.Tokenizer.load(tokenizer_folder)
    measured = np.mean(psnr(tokenizer.decode(tokenizer.encode(held_out[:96])), held_out[:96]))
    assert measured == pytest.approx(metrics["psnr"], abs=0.01)

    saved = model_folder.load(tokenizer_folder)
    assert saved.metadata == {"steps": STEPS, "image_size": SIZE, "held_out": metrics}
    assert saved.config["bits"] == 8 and saved.kind == "tokenizer"
    jax.tree.map(
        np.testing.assert_array_equal, saved.params, jax.device_get(trained_tokenizer[0].ema)
    )


def test_training_shows_in_the_psnr(tokenizer_task, trained_tokenizer):
    untrained = tiny_models.tokenizer_params()
    assert (
        evaluate(tokenizer_task, trained_tokenizer[0].ema)["psnr"]
        > evaluate(tokenizer_task, untrained)["psnr"] + 1
    )


def test_tokenizer_preview_shows_originals_over_reconstructions(
    tokenizer_task, trained_tokenizer, tokenizer_folder, held_out
):
    images = tokenizer_task.preview(trained_tokenizer[0].ema, 40)
    assert images.keys() == {"reconstructions"}
    tokenizer = bitdance_jax.Tokenizer.load(tokenizer_folder)
    originals = held_out[:16]
    expected = image_files.grid(
        np.concatenate([originals, tokenizer.decode(tokenizer.encode(originals))]), columns=16
    )
    assert images["reconstructions"].shape == expected.shape == (2 * (SIZE + 4), 16 * (SIZE + 4), 3)
    np.testing.assert_array_equal(images["reconstructions"][: SIZE + 4], expected[: SIZE + 4])
    difference = np.abs(images["reconstructions"].astype(int) - expected)
    assert (
        difference > 1
    ).mean() < 0.01  # a bit at the edge of its sign may differ between batch sizes


def test_export_in_bfloat16(trained_tokenizer, tokenizer_folder, tmp_path, held_out):
    task = TokenizerTask(replace_run(TOKENIZER, export_dtype="bfloat16"))
    task.export(trained_tokenizer[0].ema, str(tmp_path / "model"), step=STEPS, metrics={})
    assert dtypes(model_folder.load(tmp_path / "model").params) == {"bfloat16"}
    exact, rounded = (
        bitdance_jax.Tokenizer.load(tokenizer_folder),
        bitdance_jax.Tokenizer.load(tmp_path / "model"),
    )
    codes = exact.encode(held_out[:8])
    assert (rounded.encode(held_out[:8]) == codes).mean() > 0.9
    assert np.mean(psnr(rounded.decode(codes), exact.decode(codes))) > 30


def test_tokenizer_in_bfloat16(tokenizer_task, trained_tokenizer):
    """Parameters and their gradients stay float32, and what is computed is nearly the same."""
    task = TokenizerTask(replace_run(TOKENIZER, compute_dtype="bfloat16"))
    assert dtypes(jax.eval_shape(task.objective.init, jax.random.key(0))) == {"float32"}
    params = trained_tokenizer[0].ema
    assert gradient_dtypes(task, params) == {"float32"}
    rounded, exact = (evaluate(t, params)["psnr"] for t in (task, tokenizer_task))
    assert rounded != exact and rounded == pytest.approx(exact, abs=0.3)


def test_a_gan_decoder_gets_noise():
    """Abstractly: the shapes fit in training and in evaluation."""
    objective = TokenizerObjective(dataclasses.replace(TOKENIZER, model=tiny_models.GAN_TOKENIZER))
    params = jax.eval_shape(objective.init, jax.random.key(0))
    assert params["decoder"]["conv_in"]["kernel"].shape == (3, 3, 16, 32)
    batch, keys = objective.abstract_batch(16), jax.random.split(jax.random.key(0), 16)
    assert jax.eval_shape(objective.loss, params, {}, batch, keys)[0].shape == ()
    assert jax.eval_shape(objective.reconstruct, params, batch["image"], keys).shape == (
        16,
        SIZE,
        SIZE,
        3,
    )


# The class-conditional model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("class_conditional")
    tiny_models.save_tokenizer(root / "tokenizer")
    return root


@pytest.fixture(scope="module")
def config(folder):
    return ClassConditionalTraining(
        run=RunConfig(workdir=str(folder / "run"), steps=STEPS),
        model=tiny_models.MODEL,
        tokenizer=str(folder / "tokenizer"),
        data=DataConfig(
            batch_size=16, augment=AugmentConfig(min_crop=1.0, flip=0.0), cache_latents=True
        ),
        preview=tiny_models.SAMPLER,
    )


def uncached(config):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, cache_latents=False))


@pytest.fixture(scope="module")
def task(config):
    return ClassConditionalTask(config)


@pytest.fixture(scope="module")
def uncached_task(config):
    return ClassConditionalTask(uncached(config))


@pytest.fixture(scope="module")
def trained(task):
    return train(task, 3e-3)


def test_the_model_learns(trained):
    state, losses = trained
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    assert dtypes((state.params, state.ema)) == {"float32"}


def test_cached_latents_are_in_the_run_folder(task, config, folder):
    assert {path.name for path in (folder / "run").iterdir()} == {"tokens_train", "tokens_heldout"}
    held_out = TokensSource(folder / "run" / "tokens_heldout")
    assert len(held_out) == 100 and held_out[0]["codes"].shape == (8, 8, 1)
    assert task.steps_per_epoch == 1806 / 16


def test_the_number_of_images_is_reported_before_they_are_encoded(
    config, tmp_path, monkeypatch, capsys
):
    for label in range(config.model.num_classes):
        (tmp_path / str(label)).mkdir()
        for name in ("a.png", "b.png", "c.png", "c.heic"):
            (tmp_path / str(label) / name).touch()
    reported = []

    def encode(folder, source, *rest):
        reported.append(capsys.readouterr().err)
        return source

    monkeypatch.setattr(class_conditional_training, "cached_latents", encode)
    data = dataclasses.replace(config.data, source="folder", path=str(tmp_path))
    ClassConditionalTask(dataclasses.replace(config, data=data))
    others = "other files skipped: 9 (.heic 9)"
    assert reported == [f"26 images in 9 classes to train on, 1 held out; {others}\n", ""]
    assert capsys.readouterr().err == ""


def test_evaluation_is_the_held_out_loss_with_fixed_noise(task, uncached_task, trained):
    """Read from the cached bits, or made from the images inside the step: the same."""
    params, losses = trained[0].ema, trained[1]
    metrics = evaluate(task, params)
    assert metrics == evaluate(task, params) and metrics.keys() == {"loss"}
    assert 0.8 * losses[-1] < metrics["loss"] < 0.8 * losses[0]
    assert evaluate(uncached_task, params)["loss"] == pytest.approx(metrics["loss"], rel=1e-4)


def test_the_encoder_may_work_on_a_part_of_the_batch_at_a_time(uncached_task, trained, monkeypatch):
    params, batch, keys = (
        trained[0].ema,
        next(uncached_task.batches(ROWS)),
        jax.random.split(jax.random.key(0), 16),
    )

    def loss():
        return jax.jit(lambda *arguments: uncached_task.objective.loss(*arguments)[0])(
            params, uncached_task.frozen, batch, keys
        )

    at_once = loss()
    monkeypatch.setattr(class_conditional_training, "ENCODER_PIXELS", 4 * SIZE**2)
    np.testing.assert_allclose(loss(), at_once, rtol=1e-5)


@pytest.fixture(scope="module")
def exported(task, trained, folder):
    task.export(trained[0].ema, str(folder / "model"), step=STEPS, metrics={"loss": 0.5})
    return folder / "model"


def test_the_exported_folder_is_the_trained_model(task, trained, exported, config, folder):
    saved = model_folder.load(exported)
    assert saved.metadata["class_names"] == list(EmojiSource("all").class_names)
    assert saved.metadata["sampler"] == to_dict(tiny_models.SAMPLER)
    assert saved.metadata["held_out"] == {"loss": 0.5} and saved.metadata["steps"] == STEPS
    jax.tree.map(
        np.testing.assert_array_equal, saved.params["model"], jax.device_get(trained[0].ema)
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        saved.params["tokenizer"],
        model_folder.load(folder / "tokenizer").params,
    )


def test_the_exported_folder_samples(exported, config):
    model = bitdance_jax.load(exported)
    assert isinstance(model, bitdance_jax.ClassConditionalPipeline)
    assert (model.config, model.sampler) == (config.model, tiny_models.SAMPLER)
    images = model.sample(["Flags", 3], progress=False, sampler=SamplerConfig(head_steps=2))
    assert images.shape == (2, SIZE, SIZE, 3) and (images[0] != images[1]).any()


def test_the_tokenizer_may_be_that_of_an_exported_model(exported, config, task):
    other = ClassConditionalTask(dataclasses.replace(config, tokenizer=str(exported)))
    np.testing.assert_array_equal(
        next(other.batches(ROWS))["codes"], next(task.batches(ROWS))["codes"]
    )


def test_preview_rows_are_classes(task, trained, monkeypatch):
    """Previews depend on the weights, and the sampler compiles once."""
    traces = []

    class Reader(PatchReader):
        def __init__(self, model, params, labels):
            super().__init__(model, params, labels)
            self.code = jnp.where(labels % 2 == 0, 1, -1) * params["position_embedding"][0, 0]

    def quick(model, state, stop, *, noise, solver, scales):
        traces.append(solver)
        code = model.code[: state.values.shape[1], None, None]
        return state._replace(values=jnp.broadcast_to(code, state.values.shape), patch=stop)

    monkeypatch.setattr(class_conditional, "PatchReader", Reader)
    monkeypatch.setattr(next_patch, "advance", quick)
    params = trained[0].ema
    negated = params | {"position_embedding": -params["position_embedding"]}
    sheets = [task.preview(weights, 7)["samples"] for weights in (params, negated, params)]
    assert traces == [EulerMaruyama(tiny_models.SAMPLER.head_steps)]
    assert all(
        sheet.shape[0] == 9 * (SIZE + 4) and sheet.shape[1] > 8 * (SIZE + 4) for sheet in sheets
    )
    np.testing.assert_array_equal(sheets[0], sheets[2])
    cells = [sheet[:, -8 * (SIZE + 4) :].reshape(9, SIZE + 4, -1) for sheet in sheets]
    np.testing.assert_array_equal(cells[0][::2], cells[1][[1, 1, 3, 5, 7]])
    assert (cells[0][0] != cells[0][1]).any()


def test_class_conditional_in_bfloat16(config, task, trained):
    half = ClassConditionalTask(replace_run(config, compute_dtype="bfloat16"))
    assert dtypes(jax.eval_shape(half.objective.init, jax.random.key(0))) == {"float32"}
    params = trained[0].ema
    assert gradient_dtypes(half, params) == {"float32"}
    rounded, exact = (evaluate(t, params)["loss"] for t in (half, task))
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.02)


def test_export_of_the_class_conditional_model_in_bfloat16(config, trained, tmp_path):
    task = ClassConditionalTask(replace_run(config, export_dtype="bfloat16"))
    task.export(trained[0].ema, str(tmp_path / "model"), step=STEPS, metrics={})
    assert dtypes(model_folder.load(tmp_path / "model").params) == {"bfloat16"}


@pytest.mark.parametrize("remat", ["dots", "nothing"])
def test_remat_changes_no_shape(config, remat):
    objective = replace_run(config, remat=remat).make_objective()
    params, keys = (
        jax.eval_shape(objective.init, jax.random.key(0)),
        jax.random.split(jax.random.key(0), 16),
    )
    gradients, _ = jax.eval_shape(
        jax.grad(objective.loss, has_aux=True), params, {}, objective.abstract_batch(16), keys
    )
    assert jax.tree.map(lambda a: a.shape, gradients) == jax.tree.map(lambda a: a.shape, params)


# Weight decay


def decayed(task, params):
    """Which parameters change in a step without gradients: a tree of bools."""
    schedule = optax.constant_schedule(0.1)
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5), schedule, task.objective)
    gradients = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(
        lambda gradients, params: optimizer.update(gradients, optimizer.init(params), params)
    )(gradients, params)
    params, updates = jax.device_get((params, updates))
    for param, update in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        assert not update.any() or np.allclose(update, -0.05 * param, rtol=1e-5)
    return jax.tree.map(lambda update: update != 0, updates)


def test_weight_decay_of_the_class_conditional_model(task):
    """Tensors of two or more dimensions, per layer, except connector, class embedding, query tokens
    (paper section 4.2)."""
    decays = unstack(decayed(task, tiny_models.model_params()))
    excepted, checked = {"connector", "class_embedding", "query_tokens"}, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(decays):
        expected = path[-1].key not in ("bias", "scale") and path[0].key not in excepted
        assert leaf.all() if expected else not leaf.any(), path
        checked += 1
    assert excepted < decays.keys() and checked > 40
    assert decays["transformer"]["layers_1"]["attention"]["qkv"]["kernel"].all()
    assert decays["position_embedding"].all()
    assert not decays["head"]["groups_0"]["blocks_1"]["mlp_norm"]["scale"].any()


def test_weight_decay_of_the_tokenizer(tokenizer_task):
    params = random_params(Autoencoder(tiny_models.TOKENIZER), jnp.zeros((1, 4, 4, 3)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(decayed(tokenizer_task, params)):
        assert leaf.all() if path[-1].key == "kernel" else not leaf.any(), path


# Data and tokenizers that do not fit


def error_message(config):
    with pytest.raises(UserError) as caught:
        config.make_task()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_number_of_classes(config):
    other = dataclasses.replace(config.model, num_classes=10)
    message = error_message(uncached(dataclasses.replace(config, model=other)))
    assert message == "the images have 9 classes and the model 10; set model.num_classes 9"


def test_another_tokenizer_size(config, folder):
    other = dataclasses.replace(
        config.model, tokenizer=dataclasses.replace(tiny_models.TOKENIZER, bits=16, ch_mult=(1, 2))
    )
    message = error_message(dataclasses.replace(config, model=other))
    assert (
        f"{folder / 'tokenizer'} has bits 8, ch_mult (1, 1), and model.tokenizer bits 16" in message
    )


@pytest.mark.parametrize(
    ("name", "command"),
    [
        (
            "runs/emoji_tokenizer/model",
            "train it first: bitdance train emoji_tokenizer",
        ),
        (
            "runs/mine/model",
            "train it first: bitdance train emoji_tokenizer --run.workdir runs/mine",
        ),
        ("models/ae_d16c32", "bitdance convert RELEASED models/ae_d16c32"),
    ],
)
def test_no_tokenizer_folder(config, name, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    message = error_message(dataclasses.replace(config, tokenizer=name))
    assert message.startswith(f"there is no tokenizer {name}; ") and message.endswith(command)
    embedded = dataclasses.replace(
        config.model, tokenizer=bitdance_jax.load().tokenizer.config, image_size=64
    )
    offered = error_message(dataclasses.replace(config, tokenizer=name, model=embedded))
    assert offered == f"{message}, or use the embedded one: tokenizer='emoji'"


def test_no_tokenizer_of_the_imagenet_models(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    released = ClassConditionalConfig.imagenet("b_1x")
    message = error_message(dataclasses.replace(config, tokenizer="models/ae", model=released))
    assert message.endswith("bitdance convert BitDance_B_1x.pt models/ae --tokenizer-only")


def test_a_tokenizer_that_still_changes(config, tmp_path):
    TokenizerTask(replace_run(TOKENIZER, workdir=str(tmp_path))).record.write(tmp_path)
    (tmp_path / "checkpoints" / "500").mkdir(parents=True)
    assert "is not finished: its bits still change" in error_message(
        dataclasses.replace(config, tokenizer=str(tmp_path))
    )


def test_missing_mirror_images_in_tokens_are_reported(capsys):
    """Only if training uses centre crops: of tokens with random crops, when those fade out."""
    fading, always = AugmentConfig(decay_start=1, decay_end=2), AugmentConfig()
    for versions, augment, reported in (
        (Versions(), always, True),
        (Versions(), AugmentConfig(flip=0), False),
        (Versions(flips=True), always, False),
        (Versions(crops=2), always, False),
        (Versions(crops=2), fading, True),
        (Versions(flips=True, crops=2), fading, False),
    ):
        class_conditional_training._note_missing_flips("tokens", versions, augment)
        assert (
            "note: the tokens in tokens hold no mirror images" in capsys.readouterr().err
        ) == reported
