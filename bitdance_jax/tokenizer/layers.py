"""Layers of the tokenizer's encoder and decoder (paper 3.1). Arrays are NHWC."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from bitdance_jax.nn import linear


GROUPS = 32
"""Of every GroupNorm."""

CONVOLUTION = "convolution"
"""Name of the outputs that `residual_block` may store."""

Remat = Literal["none", "dots", "nothing"]
"""As `RunConfig.remat`."""


class GroupNorm(nn.Module):
    """flax.linen.GroupNorm of 32 groups, with statistics in float32."""

    dtype: DTypeLike = jnp.float32
    affine: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels) if self.affine else None
        bias = self.param("bias", nn.initializers.zeros, channels) if self.affine else None
        return normalize(x, *group_statistics(x), scale, bias).astype(self.dtype)


def split_groups(x: Float[Array, "B H W C"]) -> Float32[Array, "B H W G F"]:
    return rearrange(x, "b h w (g f) -> b h w g f", g=GROUPS).astype(jnp.float32)


def of_channels(
    statistics: Float32[Array, "B 1 1 G 1"], channels: int
) -> Float32[Array, "B 1 1 C"]:
    """The statistics of the group that each channel is in."""
    return jnp.repeat(statistics[..., 0], channels // GROUPS, axis=-1)


def group_statistics(
    x: Float[Array, "B H W C"],
) -> tuple[Float32[Array, "B 1 1 C"], Float32[Array, "B 1 1 C"]]:
    """Mean and variance of the group that each channel is in, over an image."""
    groups = split_groups(x)
    mean = jnp.mean(groups, axis=(1, 2, 4), keepdims=True)
    # E[x^2] - E[x]^2 would lose two digits against the release.
    variance = jnp.mean(jnp.square(groups - mean), axis=(1, 2, 4), keepdims=True)
    return of_channels(mean, x.shape[-1]), of_channels(variance, x.shape[-1])


def normalize(
    x: Float[Array, "B H W C"],
    mean: Float32[Array, "B 1 1 C"],
    variance: Float32[Array, "B 1 1 C"],
    scale: Float[Array, "C"] | None,
    bias: Float[Array, "C"] | None,
) -> Float32[Array, "B H W C"]:
    """(x - mean) / sqrt(variance + 1e-6) * scale + bias."""
    multiplier = jax.lax.rsqrt(variance + 1e-6)
    y = (x - mean) * (multiplier if scale is None else multiplier * scale)
    return y if bias is None else y + bias


def conv3x3(
    features: int, dtype: DTypeLike, use_bias: bool = True, stride: int = 1, name: str | None = None
) -> linear.Conv:
    """A convolution that keeps height and width, or halves them with stride 2."""
    # Explicit padding: "SAME" would pad a stride-2 convolution on one side only.
    return linear.Conv(
        features,
        (3, 3),
        strides=(stride, stride),
        padding=1,
        use_bias=use_bias,
        dtype=dtype,
        name=name,
    )


class ResidualBlock(nn.Module):
    """GroupNorm, swish, conv3x3, twice; a 1x1 convolution on the shortcut where widths differ."""

    features: int
    dtype: DTypeLike = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        y = nn.silu(GroupNorm(self.dtype, name="norm1")(x))
        y = conv3x3(self.features, self.dtype, self.use_bias, name="conv1")(y)
        y = checkpoint_name(y, CONVOLUTION)
        y = nn.silu(GroupNorm(self.dtype, name="norm2")(y))
        y = conv3x3(self.features, self.dtype, self.use_bias, name="conv2")(y)
        y = checkpoint_name(y, CONVOLUTION)
        if x.shape[-1] != self.features:
            x = linear.Conv(
                self.features, (1, 1), use_bias=self.use_bias, dtype=self.dtype, name="nin_shortcut"
            )(x)
        return x + y


def residual_block(remat: Remat) -> type[ResidualBlock]:
    """`ResidualBlock`, of which the backward pass stores everything ("none"), its input and the
    outputs of its convolutions ("dots"), or its input alone ("nothing")."""
    if remat == "none":
        return ResidualBlock
    keep = jax.checkpoint_policies.save_only_these_names(CONVOLUTION)
    return nn.remat(ResidualBlock, policy=keep if remat == "dots" else None)


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm with scale and shift from the spread and mean of the codes over space, per bit."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], codes: Float[Array, "B h w K"]
    ) -> Float[Array, "B H W C"]:
        spread, mean = code_statistics(codes)
        scale = linear.Dense(x.shape[-1], dtype=self.dtype, name="gamma")(spread)
        shift = linear.Dense(x.shape[-1], dtype=self.dtype, name="beta")(mean)
        return GroupNorm(self.dtype, affine=False)(x) * scale + shift


def code_statistics(
    codes: Float[Array, "B h w K"],
) -> tuple[Float[Array, "B 1 1 K"], Float[Array, "B 1 1 K"]]:
    """Standard deviation and mean of each bit over the tokens of an image."""
    spread = jnp.sqrt(jnp.var(codes, axis=(1, 2), ddof=1, keepdims=True) + 1e-6)
    return spread, jnp.mean(codes, axis=(1, 2), keepdims=True)


def depth_to_space(x: Float[Array, "B h w C"]) -> Float[Array, "B H W D"]:
    """2x2 upsampling in DCR order: the channel index is (row offset, column offset, channel)."""
    return rearrange(x, "b h w (r s c) -> b (h r) (w s) c", r=2, s=2)
