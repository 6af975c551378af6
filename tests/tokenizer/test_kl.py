"""Continuous latents: the layout of released files, and numbers against numpy from their keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from released_kl import TINY, released_shapes, released_state

from bitdance_jax.config import ConfigError, TokenizerConfig
from bitdance_jax.convert import keys, parameters, released_configs
from bitdance_jax.tokenizer import autoencoder, codes, kl
from bitdance_jax.tokenizer.autoencoder import Autoencoder


class Reference:
    """Encoder and decoder in float64 with numpy, NCHW, from the released keys."""

    def __init__(self, state: dict[str, np.ndarray], config: TokenizerConfig) -> None:
        self.state = {key: np.float64(array) for key, array in state.items()}
        self.config = config

    def norm(self, name, x):
        groups = x.reshape(len(x), 32, -1)
        mean, variance = groups.mean(-1, keepdims=True), groups.var(-1, keepdims=True)
        y = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return y * weight[:, None, None] + bias[:, None, None]

    def conv(self, name, x, stride=1, padding=None):
        kernel = self.state[f"{name}.weight"]
        size = kernel.shape[-1]
        padding = padding or (((size - 1) // 2,) * 2,) * 2
        x = np.pad(x, ((0, 0), (0, 0), *padding))
        windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))
        y = np.einsum("bchwij,ocij->bohw", windows[:, :, ::stride, ::stride], kernel)
        return y + self.state[f"{name}.bias"][:, None, None]

    def swish(self, x):
        return x / (1 + np.exp(-x))

    def residual(self, name, x):
        y = self.conv(f"{name}.conv1", self.swish(self.norm(f"{name}.norm1", x)))
        y = self.conv(f"{name}.conv2", self.swish(self.norm(f"{name}.norm2", y)))
        if f"{name}.nin_shortcut.weight" in self.state:
            x = self.conv(f"{name}.nin_shortcut", x)
        return x + y

    def attention(self, name, x):
        batch, width, *size = x.shape
        y = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{n}", y).reshape(batch, width, -1) for n in "qkv")
        scores = np.einsum("bci,bcj->bij", q, k) / np.sqrt(width)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("bij,bcj->bci", weights, v).reshape(batch, width, *size)
        return x + self.conv(f"{name}.proj_out", y)

    def middle(self, side, x):
        x = self.attention(f"{side}.mid.attn_1", self.residual(f"{side}.mid.block_1", x))
        return self.residual(f"{side}.mid.block_2", x)

    def blocks(self, level, x):
        j = 0
        while f"{level}.block.{j}.norm1.weight" in self.state:
            x = self.residual(f"{level}.block.{j}", x)
            if f"{level}.attn.{j}.norm.weight" in self.state:
                x = self.attention(f"{level}.attn.{j}", x)
            j += 1
        return x

    def moments(self, images):
        x = self.conv("encoder.conv_in", images.transpose(0, 3, 1, 2))
        for i in range(len(self.config.ch_mult)):
            x = self.blocks(f"encoder.down.{i}", x)
            if i < len(self.config.ch_mult) - 1:
                x = self.conv(f"encoder.down.{i}.downsample.conv", x, 2, ((0, 1), (0, 1)))
        x = self.swish(self.norm("encoder.norm_out", self.middle("encoder", x)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", x)).transpose(0, 2, 3, 1)

    def decode(self, z):
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", z.transpose(0, 3, 1, 2)))
        x = self.middle("decoder", x)
        for i in reversed(range(len(self.config.ch_mult))):
            x = self.blocks(f"decoder.up.{i}", x)
            if i > 0:
                x = x.repeat(2, axis=2).repeat(2, axis=3)
                x = self.conv(f"decoder.up.{i}.upsample.conv", x)
        x = self.swish(self.norm("decoder.norm_out", x))
        return self.conv("decoder.conv_out", x).transpose(0, 2, 3, 1)


def test_encoder_and_decoder_compute_what_the_released_weights_mean():
    state = released_state(TINY)
    reference = Reference(state, TINY)
    params = keys.convert(state, keys.tokenizer(TINY))
    model = Autoencoder(TINY)
    rng = np.random.default_rng(1)
    images = np.float32(rng.uniform(-1, 1, (2, 8, 12, 3)))
    noise = np.float32(rng.standard_normal((2, 4, 6, 3)))

    @jax.jit
    def run(params, images, noise):
        variables = {"params": params}
        latents = model.apply(variables, images, method="encode")
        decoded = model.apply(variables, latents, method="decode")
        return latents, decoded, model.apply(variables, images, noise)

    latents, decoded, (reconstruction, moments) = run(params, images, noise)
    expected = reference.moments(np.float64(images))
    mean, log_variance = np.split(expected, 2, axis=-1)
    np.testing.assert_allclose(moments, expected, atol=2e-5)
    np.testing.assert_allclose(latents, TINY.latent_scale * mean, atol=2e-5)
    np.testing.assert_allclose(decoded, reference.decode(mean), atol=1e-4)
    sample = mean + np.exp(log_variance / 2) * noise
    np.testing.assert_allclose(reconstruction, reference.decode(sample), atol=1e-4)
    divergence = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance)
    np.testing.assert_allclose(kl.divergence(moments), divergence, atol=1e-4)


@pytest.mark.parametrize("attention", ["encoder", "both", "none"])
def test_the_released_layout_at_full_size(attention):
    """MAR's kl16 has attention at 16x16 in the encoder, latent diffusion's in both."""
    config = dataclasses.replace(TokenizerConfig.kl16(), coarsest_attention=attention)
    shapes = released_shapes(config)
    ours = parameters.release_shapes(autoencoder.abstract_params(config), keys.tokenizer(config))
    assert ours == shapes
    inferred = released_configs.tokenizer_config(shapes, {})
    scale = 0.2325 if attention == "encoder" else 1.0
    assert inferred == dataclasses.replace(config, latent_scale=scale)
    record = released_configs.tokenizer_record(config)
    assert released_configs.tokenizer_config(shapes, record) == config


@pytest.mark.parametrize("bits", [8, 12, 32])
def test_packed_bits_are_unpacked(bits):
    config = TokenizerConfig(bits=bits, num_codebooks=1)
    bit_codes = np.random.default_rng(bits).choice(np.int8([-1, 1]), (2, 3, 4, bits))
    unpacked = codes.unpack(jnp.asarray(np.packbits(bit_codes > 0, axis=-1)), config)
    assert unpacked.dtype == np.float32
    np.testing.assert_array_equal(unpacked, bit_codes)


def test_packed_latents():
    values = np.random.default_rng(0).standard_normal((2, 3, 4, 3)).astype(np.float32)
    packed = codes.pack(jnp.asarray(values), TINY)
    assert packed.shape == (2, 3, 4, TINY.packed_bytes) and packed.dtype == np.uint8
    half = np.ascontiguousarray(packed).view(np.float16)
    np.testing.assert_array_equal(half, values.astype(np.float16))
    np.testing.assert_array_equal(codes.unpack(packed, TINY), half.astype(np.float32))


def test_a_continuous_tokenizer_has_neither_a_gan_decoder_nor_uniwetoks_blocks():
    for fields in ({"decoder": "gan"}, {"decoder": "gan", "attention_blocks": 2}):
        with pytest.raises(ConfigError, match="set decoder plain and attention_blocks 0"):
            TokenizerConfig(latents="continuous", **fields)
