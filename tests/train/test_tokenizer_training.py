"""Training the tokenizer at toy size on the emoji: losses, previews, exported models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_models
from few_emoji import TRAINED
from random_params import random_params
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
    RunConfig,
    TokenizerLossConfig,
)
from bitdance_jax.data.config import DataConfig
from bitdance_jax.data.emoji import emoji_images
from bitdance_jax.errors import ConfigError, FileError
from bitdance_jax.evaluate.psnr import psnr
from bitdance_jax.fid import inception, inception_weights
from bitdance_jax.fid.frechet import frechet_distance
from bitdance_jax.fid.statistics import gaussian
from bitdance_jax.io import image_files, model_folder
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.train.task import Batches, Objective, Task
from bitdance_jax.train.tokenizer_objective import TokenizerObjective
from bitdance_jax.train.tokenizer_training import TokenizerTask, TokenizerTraining


pytestmark = pytest.mark.usefixtures("few_emoji")

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
    return emoji_images("heldout", SIZE)


def test_make_task(tokenizer_task):
    assert isinstance(TOKENIZER.make_task(), TokenizerTask)
    assert isinstance(tokenizer_task, Task) and isinstance(tokenizer_task.batches(ROWS), Batches)
    assert isinstance(tokenizer_task.objective, Objective)
    assert tokenizer_task.steps_per_epoch == TRAINED / 16


def test_the_tokenizer_learns(trained_tokenizer):
    state, losses = trained_tokenizer
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    assert dtypes((state.params, state.ema)) == {"float32"}


def test_batches_are_what_the_objective_expects(tokenizer_task):
    check_batches(tokenizer_task)


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
    images = jax.eval_shape(objective.reconstruct, params, {}, batch["image"], keys)
    assert images.shape == (16, SIZE, SIZE, 3)


def test_weight_decay_of_the_tokenizer(tokenizer_task):
    params = random_params(Autoencoder(tiny_models.TOKENIZER), jnp.zeros((1, 4, 4, 3)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(decayed(tokenizer_task, params)):
        assert leaf.all() if path[-1].key == "kernel" else not leaf.any(), path


def test_rfid(monkeypatch):
    """With 12 features in place of Inception's: that of the same features outside of the run, in
    which repeated held-out rows count once."""

    def features(params, images):
        x = images.astype(np.float32) * params["scale"]
        pooled = x.reshape(len(x), 2, SIZE // 2, 2, SIZE // 2, 3).mean((2, 4)).reshape(len(x), -1)
        return inception.Features(pooled)

    monkeypatch.setattr(inception, "features", features)
    monkeypatch.setattr(inception_weights, "load", lambda path: {"scale": np.float32(0.1)})
    config = dataclasses.replace(TOKENIZER, inception="weights", data=DataConfig(batch_size=64))
    task = config.make_task()
    task.held_out_size = 40
    params = tiny_models.tokenizer_params()
    found = evaluate(task, params)
    assert {"psnr", "ssim", "bits_used", "bit_balance", "rfid"} == found.keys()

    images = next(task.held_out(np.arange(40)))["image"]
    keys = jax.random.split(jax.random.key(0), 40)
    reconstructions = jax.jit(task.objective.reconstruct)(params, {}, images, keys)
    originals, ours = (
        gaussian(np.asarray(features(task.frozen["inception"], np.asarray(x)).pooled))
        for x in (images, reconstructions)
    )
    assert found["rfid"] == pytest.approx(frechet_distance(ours, originals), rel=1e-3)


def test_rfid_with_the_weights_of_another_network(tmp_path):
    weights = tmp_path / "vgg16.safetensors"
    safetensors.numpy.save_file({"features.0.weight": np.zeros((64, 3, 3, 3), np.float32)}, weights)
    with pytest.raises(FileError, match="does not hold the FID Inception-v3"):
        dataclasses.replace(TOKENIZER, inception=str(weights)).make_task()


def test_crops_of_several_sizes():
    """The noise of a GAN decoder has the size of its image. (Abstractly.)"""
    config = dataclasses.replace(
        TOKENIZER, model=tiny_models.GAN_TOKENIZER, crop_sizes=(8, 12), crop_weights=(1.0, 2.0)
    )
    task = config.make_task()
    objective = task.objective
    params = jax.eval_shape(objective.init, jax.random.key(0))
    keys = jax.random.split(jax.random.key(0), 16)
    batches = task.batches(ROWS)
    found = [next(batches) for _ in range(4)]
    assert {batch["image"].shape[1] for batch in found} == {8, 12}
    for batch in found:
        assert jax.eval_shape(objective.loss, params, {}, batch, keys)[0].shape == ()
    held_out = next(task.held_out(ROWS))
    assert held_out["image"].shape[1] == SIZE
    jax.eval_shape(objective.evaluate, params, {}, held_out, keys)
    assert objective.abstract_batch(2)["image"].shape[1] == 12
    assert objective.mean_work == pytest.approx((1 * 4 / 9 + 2) / 3)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"crop_sizes": (16, 17)}, "crop_sizes"),
        ({"crop_sizes": (16, 18), "crop_weights": (1.0,)}, "crop_weights"),
        ({"crop_sizes": (16, 8), "loss": TokenizerLossConfig(perceptual=1.0)}, "crop_sizes"),
    ],
)
def test_crops_that_do_not_fit(fields, field):
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(TOKENIZER, **fields)
    assert error.value.field == field
