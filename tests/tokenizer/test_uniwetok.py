"""UniWeTok against its recorded outputs, and its files."""

import dataclasses
import json

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from golden_models import GOLDEN, assert_close, nhwc

import bitdance_jax
from bitdance_jax.config import TokenizerConfig
from bitdance_jax.convert import keys, released_configs
from bitdance_jax.convert.convert import convert
from bitdance_jax.convert.export import export
from bitdance_jax.errors import UserError
from bitdance_jax.evaluate.images import ArrayImages
from bitdance_jax.evaluate.psnr import psnr
from bitdance_jax.evaluate.reconstruction import evaluate_tokenizer
from bitdance_jax.tokenizer import autoencoder, lfq, uniwetok
from bitdance_jax.tokenizer.autoencoder import Autoencoder


@pytest.fixture(scope="module")
def state():
    return golden_models.read("uniwetok/weights")


@pytest.fixture(scope="module")
def record():
    return {"ddconfig": json.loads((GOLDEN / "uniwetok" / "config.json").read_text())}


@pytest.fixture(scope="module")
def config(state, record) -> TokenizerConfig:
    shapes = {key: array.shape for key, array in state.items()}
    return released_configs.tokenizer_config(shapes, record)


@pytest.fixture(scope="module")
def params(state, config):
    return jax.tree.map(jnp.asarray, keys.convert(state, keys.tokenizer(config)))


@pytest.fixture(scope="module")
def io():
    return golden_models.read("uniwetok/io")


def test_sizes(config, params):
    assert config == TokenizerConfig(
        bits=16,
        ch=32,
        ch_mult=(1, 1, 2),
        num_res_blocks=1,
        decoder="gan",
        num_codebooks=2,
        attention_blocks=2,
        attention_heads=4,
    )
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    expected = autoencoder.abstract_params(config)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, expected)


def test_encode(config, params, io):
    model = Autoencoder(config)
    z = jax.jit(lambda image: model.apply({"params": params}, image, method="encode"))(
        nhwc(io["image"])
    )
    assert_close(z, nhwc(io["pre_quant"]))
    np.testing.assert_array_equal(lfq.quantize(z), nhwc(io["codes"]))


def test_decode(config, params, io):
    model = Autoencoder(config)
    images = jax.jit(
        lambda codes, noise: model.apply({"params": params}, codes, noise, method="decode")
    )(nhwc(io["codes"]), nhwc(io["noise"]))
    assert_close(images, nhwc(io["reconstruction"]))


def test_one_row_of_tokens_is_refused(config, params):
    image = jnp.zeros((1, config.downsampling, 2 * config.downsampling, 3))
    with pytest.raises(UserError, match="at least two tokens a side"):
        Autoencoder(config).apply({"params": params}, image, method="encode")


def test_positions_of_the_grid_that_it_was_trained_for():
    np.testing.assert_allclose(uniwetok.positions(8, "encoder"), np.arange(8) + 0.5)
    np.testing.assert_allclose(uniwetok.positions(8, "decoder"), np.arange(8) + 0.5)


def test_the_released_sizes():
    config = TokenizerConfig.uniwetok()
    assert config.bits == 128
    assert config.downsampling == 32
    count = sum(x.size for x in jax.tree.leaves(autoencoder.abstract_params(config)))
    assert 3e8 < count < 8e8


def test_files_there_and_back(tmp_path, state, record, config):
    file = tmp_path / "uniwetok.safetensors"
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, file)
    (tmp_path / "uniwetok_config.json").write_text(json.dumps(record))
    convert(str(file), str(tmp_path / "model"))
    tokenizer = bitdance_jax.Tokenizer.load(tmp_path / "model")
    assert tokenizer.config == config
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    codes = tokenizer.encode(images)
    assert codes.shape == (2, 4, 6, 16)
    assert tokenizer.decode(codes, seed=1).shape == images.shape
    scores = evaluate_tokenizer(
        tokenizer, ArrayImages(images), None, batch_size=2, show=2, progress=False
    )
    reconstructions = tokenizer.decode(codes)
    assert scores.scores.psnr == pytest.approx(psnr(reconstructions, images).mean(), abs=0.01)
    narrow = ArrayImages(images[:, :, :4])
    with pytest.raises(UserError, match="at least two tokens a side"):
        evaluate_tokenizer(tokenizer, narrow, None, batch_size=2, show=1, progress=False)

    export(str(tmp_path / "model"), str(tmp_path / "back.safetensors"))
    back = safetensors.numpy.load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys()
    for key, array in back.items():
        np.testing.assert_array_equal(array, state[key], err_msg=key)
    recorded = json.loads((tmp_path / "back_config.json").read_text())["ddconfig"]
    assert recorded["n_heads"] == 4
    assert dataclasses.replace(config, attention_heads=16) != config
