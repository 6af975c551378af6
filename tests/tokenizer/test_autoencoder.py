import functools
from typing import NamedTuple

import compiling
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from golden_models import assert_close, nhwc
from random_params import random_params

from bitdance_jax.config import TokenizerConfig
from bitdance_jax.errors import UserError
from bitdance_jax.tokenizer import layers, lfq
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.tokenizer.layers import depth_to_space


class Toy(NamedTuple):
    model: Autoencoder
    variables: dict


@pytest.fixture(scope="module")
def toy() -> Toy:
    config, params = golden_models.tokenizer("tokenizer")
    return Toy(Autoencoder(config), {"params": params})


@pytest.fixture(scope="module")
def io() -> dict[str, np.ndarray]:
    return golden_models.read("tokenizer/io")


@compiling.optimized()
def test_encode(toy, io):
    z = jax.jit(functools.partial(toy.model.apply, method="encode"))(
        toy.variables, nhwc(io["image"])
    )
    assert_close(z, nhwc(io["pre_quant"]))
    np.testing.assert_array_equal(lfq.quantize(z), nhwc(io["codes"]))


@compiling.optimized()
def test_decode(toy, io):
    images = jax.jit(functools.partial(toy.model.apply, method="decode"))(
        toy.variables, nhwc(io["codes"])
    )
    assert_close(images, nhwc(io["reconstruction"]))


def test_decode_of_sampled_codes(toy):
    sample = golden_models.read("t2i_4x/sample_nocfg")
    images = jax.jit(functools.partial(toy.model.apply, method="decode"))(
        toy.variables, nhwc(sample["codes"])
    )
    assert_close(images, nhwc(sample["image"]))


@compiling.optimized()
def test_gan_decode():
    config, params = golden_models.tokenizer("tokenizer_gan")
    assert config.decoder == "gan"
    io = golden_models.read("tokenizer_gan/io")
    decode = jax.jit(functools.partial(Autoencoder(config).apply, method="decode"))
    assert_close(
        decode({"params": params}, nhwc(io["codes"]), nhwc(io["noise"])), nhwc(io["reconstruction"])
    )


def test_bfloat16():
    config = TokenizerConfig(bits=4, ch=32, ch_mult=(1, 2), num_res_blocks=1)
    images = jax.random.normal(jax.random.key(1), (2, 8, 12, 3))
    variables = {"params": random_params(Autoencoder(config), images)}
    exact, low = (
        jax.jit(Autoencoder(config, dtype).apply)(variables, images)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert [y.dtype for y in low] == [jnp.bfloat16, jnp.float32]
    assert_close(low[1], exact[1], 0.05)


@pytest.mark.parametrize(("height", "width"), [(32, 80), (128, 16)])
def test_any_multiple_of_the_downsampling(toy, height, width):
    images, z = jax.eval_shape(toy.model.apply, toy.variables, jnp.zeros((2, height, width, 3)))
    assert images.shape == (2, height, width, 3)
    assert z.shape == (2, height // 16, width // 16, 8)


@pytest.mark.parametrize("shape", [(1, 40, 32, 3), (1, 32, 8, 3), (1, 32, 32, 4)])
def test_wrong_images(toy, shape):
    height, width, channels = shape[1:]
    with pytest.raises(UserError, match=f"divisible by 16, got {height}x{width} with {channels}"):
        toy.model.apply(toy.variables, jnp.zeros(shape), method="encode")


def test_wrong_codes(toy):
    codes = jnp.ones((1, 2, 2, 8))
    with pytest.raises(UserError, match="codes have 8 bits, got 7"):
        toy.model.apply(toy.variables, codes[..., :7], method="decode")
    with pytest.raises(UserError, match="at least two"):
        toy.model.apply(toy.variables, codes[:, :1, :1], method="decode")
    with pytest.raises(UserError, match="a plain decoder takes no noise"):
        toy.model.apply(toy.variables, codes, codes, method="decode")
    config, params = golden_models.tokenizer("tokenizer_gan")
    with pytest.raises(UserError, match="a gan decoder takes noise"):
        Autoencoder(config).apply({"params": params}, codes, method="decode")


def test_depth_to_space_order():
    """Channel index = (row offset, column offset, channel)."""
    x = jnp.arange(12.0).reshape(1, 1, 1, 12)
    np.testing.assert_array_equal(depth_to_space(x)[0, :, :, 0], [[0, 3], [6, 9]])
    np.testing.assert_array_equal(depth_to_space(x)[0, 1, 0], [6, 7, 8])


@pytest.mark.parametrize(
    ("config", "millions"),
    [(TokenizerConfig.d16c32(), 460), (TokenizerConfig.d32c128(), 421)],
    ids=["d16c32", "d32c128"],
)
def test_released_sizes(config, millions):
    side = 2 * config.downsampling
    noise = jnp.zeros((1, 2, 2, config.bits)) if config.decoder == "gan" else None
    variables = jax.eval_shape(
        Autoencoder(config).init, jax.random.key(0), jnp.zeros((1, side, side, 3)), noise
    )
    assert round(sum(leaf.size for leaf in jax.tree.leaves(variables)) / 1e6) == millions


def test_rematerialization_changes_only_what_is_stored():
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 32))
    params = layers.ResidualBlock(64).init(jax.random.key(1), x)

    def stored_and_gradient(remat):
        block = layers.residual_block(remat)(64)
        y, pull_back = jax.vjp(lambda params: block.apply(params, x), params)
        return sum(leaf.size for leaf in jax.tree.leaves(pull_back)), pull_back(y)[0]

    (everything, expected), (dots, ours), (nothing, again) = map(
        stored_and_gradient, ("none", "dots", "nothing")
    )
    assert everything > dots > nothing
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, expected
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), again, ours)


@pytest.mark.parametrize("config", [tiny_models.TOKENIZER, tiny_models.GAN_TOKENIZER])
def test_rematerialization_does_not_rename_parameters(config):
    image = jnp.zeros((1, 4, 4, 3))
    noise = jnp.zeros((1, 2, 2, 8)) if config.decoder == "gan" else None
    trees = [
        jax.eval_shape(Autoencoder(config, remat=remat).init, jax.random.key(0), image, noise)
        for remat in ("none", "nothing")
    ]
    assert trees[0] == trees[1]
