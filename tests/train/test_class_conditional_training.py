"""Training the class-conditional model at toy size on the emoji, and what does not fit it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from few_emoji import HELD_OUT, TRAINED
from short_training import (
    ROWS,
    SIZE,
    STEPS,
    check_batches,
    decayed,
    dtypes,
    evaluate,
    gradient_dtypes,
    replace_run,
    train,
)

import bitdance_jax
from bitdance_jax.config import (
    AugmentConfig,
    ClassConditionalConfig,
    RunConfig,
    SamplerConfig,
    TokenizerConfig,
    from_dict,
    to_dict,
)
from bitdance_jax.data.config import DataConfig
from bitdance_jax.data.emoji import EmojiSource
from bitdance_jax.data.tokens import TokensSource, Versions
from bitdance_jax.errors import UserError
from bitdance_jax.io import model_folder, model_lookup
from bitdance_jax.models import class_conditional
from bitdance_jax.models.class_conditional import PatchReader
from bitdance_jax.nn.stack import unstack
from bitdance_jax.sampling import next_patch
from bitdance_jax.sampling.solvers import EulerMaruyama
from bitdance_jax.train import class_conditional_training
from bitdance_jax.train.class_conditional_training import (
    ClassConditionalTask,
    ClassConditionalTraining,
)
from bitdance_jax.train.tokenizer_training import (
    TokenizerTraining,
)


pytestmark = pytest.mark.usefixtures("few_emoji")


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


def test_batches_are_what_the_objective_expects(task, uncached_task):
    check_batches(task)
    check_batches(uncached_task)


def test_the_model_learns(trained):
    state, losses = trained
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    assert dtypes((state.params, state.ema)) == {"float32"}


def test_cached_latents_are_in_the_run_folder(task, config, folder):
    assert {path.name for path in (folder / "run").iterdir()} == {"tokens_train", "tokens_heldout"}
    held_out = TokensSource(folder / "run" / "tokens_heldout")
    assert len(held_out) == HELD_OUT and held_out[0]["codes"].shape == (8, 8, 1)
    assert task.steps_per_epoch == TRAINED / 16


def test_the_number_of_images_is_reported_before_they_are_encoded(
    config, tmp_path, monkeypatch, capsys
):
    for label in range(config.model.num_classes):
        (tmp_path / str(label)).mkdir()
        for name in ("a.png", "b.png", "c.png", "c.heic"):
            (tmp_path / str(label) / name).touch()
    reported = []

    def encode(folder, source, *_, **options):
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
    assert saved.metadata["class_names"] == list(EmojiSource().class_names)
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

    def quick(model, state, stop, *, solver, **options):
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
    sizes = from_dict(TokenizerConfig, model_lookup.read_config("emoji").config["tokenizer"])
    embedded = dataclasses.replace(config.model, tokenizer=sizes, image_size=64)
    offered = error_message(dataclasses.replace(config, tokenizer=name, model=embedded))
    assert offered == f"{message}, or use the embedded one: tokenizer='emoji'"


def test_no_tokenizer_of_the_imagenet_models(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    released = ClassConditionalConfig.imagenet("b_1x")
    message = error_message(dataclasses.replace(config, tokenizer="models/ae", model=released))
    assert message.endswith("bitdance convert BitDance_B_1x.pt models/ae --tokenizer-only")


def test_a_tokenizer_that_still_changes(config, tmp_path):
    run = RunConfig(workdir=str(tmp_path), steps=STEPS)
    tokenizer = TokenizerTraining(run=run, model=tiny_models.TOKENIZER, image_size=SIZE)
    tokenizer.make_task().record.write(tmp_path)
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
