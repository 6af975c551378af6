"""Continuous latents: the autoencoder with a Kullback-Leibler term of latent diffusion.

(arXiv 2112.10752; MAR's variant, arXiv 2406.11838, is in tables 12 and 13 of the paper.) The
encoder gives mean and logarithm of the variance of a normal distribution for each number of a
token. Arrays are NHWC.
"""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bitdance_jax.config import TokenizerConfig
from bitdance_jax.nn import attention, linear
from bitdance_jax.tokenizer.layers import GroupNorm, Remat, conv3x3, residual_block


LOG_VARIANCE = (-30.0, 20.0)
"""Limits of the logarithm of the variance."""


class Encoder(nn.Module):
    """Images in [-1, 1] to means and logarithms of variances, before their scale.

    Level i has ch * ch_mult[i] channels; level 0 is the finest.
    """

    config: TokenizerConfig
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w two_K"]:
        config = self.config
        widths = [config.ch * m for m in config.ch_mult]
        last = len(widths) - 1
        block_of = residual_block(self.remat)
        x = conv3x3(config.ch, self.dtype, name="conv_in")(images)
        for level, width in enumerate(widths):
            attends = level == last and config.coarsest_attention != "none"
            for block in range(config.num_res_blocks):
                x = block_of(width, self.dtype, True, name=f"down_{level}_block_{block}")(x)
                if attends:
                    x = Attention(self.dtype, name=f"down_{level}_attention_{block}")(x)
            if level < last:
                x = _downsample(width, self.dtype, f"down_{level}_downsample")(x)
        x = _middle(x, self.dtype, self.remat)
        x = nn.silu(GroupNorm(self.dtype, name="norm_out")(x))
        # In float32 whatever the compute type: these are the numbers that a model learns.
        x = conv3x3(2 * config.bits, jnp.float32, name="conv_out")(x)
        return linear.Conv(2 * config.bits, (1, 1), dtype=jnp.float32, name="quant_conv")(x)


class Decoder(nn.Module):
    """Latents, divided by their scale, to images, about [-1, 1] (not clipped)."""

    config: TokenizerConfig
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(self, latents: Float[Array, "B h w K"]) -> Float[Array, "B H W C"]:
        config = self.config
        widths = [config.ch * m for m in config.ch_mult]
        last = len(widths) - 1
        block_of = residual_block(self.remat)
        x = linear.Conv(config.bits, (1, 1), dtype=self.dtype, name="post_quant_conv")(latents)
        x = conv3x3(widths[-1], self.dtype, name="conv_in")(x)
        x = _middle(x, self.dtype, self.remat)
        for level in reversed(range(len(widths))):
            attends = level == last and config.coarsest_attention == "both"
            for block in range(config.num_res_blocks + 1):
                name = f"up_{level}_block_{block}"
                x = block_of(widths[level], self.dtype, True, name=name)(x)
                if attends:
                    x = Attention(self.dtype, name=f"up_{level}_attention_{block}")(x)
            if level > 0:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = conv3x3(widths[level], self.dtype, name=f"up_{level}_upsample")(x)
        x = nn.silu(GroupNorm(self.dtype, name="norm_out")(x))
        return conv3x3(config.image_channels, self.dtype, name="conv_out")(x)


class Attention(nn.Module):
    """Full attention of one head over all positions of an image, with a residual connection."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        height, channels = x.shape[1], x.shape[-1]
        y = GroupNorm(self.dtype, name="norm")(x)

        def project(name: str, y: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
            return linear.Conv(channels, (1, 1), dtype=self.dtype, name=name)(y)

        q, k, v = (rearrange(project(n, y), "b h w c -> b 1 (h w) c") for n in "qkv")
        y = attention.attend(q, k, v, mask=None)
        return x + project("proj_out", rearrange(y, "b 1 (h w) c -> b h w c", h=height))


def _middle(x: Float[Array, "B h w C"], dtype: DTypeLike, remat: Remat) -> Float[Array, "B h w C"]:
    """The blocks at the coarsest level, as submodules of the caller."""
    block_of = residual_block(remat)
    x = block_of(x.shape[-1], dtype, True, name="mid_1")(x)
    x = Attention(dtype, name="mid_attention")(x)
    return block_of(x.shape[-1], dtype, True, name="mid_2")(x)


def _downsample(features: int, dtype: DTypeLike, name: str) -> linear.Conv:
    """A convolution that halves height and width, padded after the last row and column alone."""
    padding = ((0, 1), (0, 1))
    return linear.Conv(features, (3, 3), strides=(2, 2), padding=padding, dtype=dtype, name=name)


def split_moments(
    moments: Float[Array, "B h w two_K"],
) -> tuple[Float[Array, "B h w K"], Float[Array, "B h w K"]]:
    """Mean and log variance of each number, from the encoder's output."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, *LOG_VARIANCE)


def divergence(moments: Float[Array, "B h w two_K"]) -> Float[Array, "B h w K"]:
    """Kullback-Leibler divergence of each number's distribution from the standard normal one."""
    mean, log_variance = split_moments(moments)
    return 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
