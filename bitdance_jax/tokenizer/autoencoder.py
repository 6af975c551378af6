"""The CNN autoencoder between images and bits (paper 3.1): encoder, and the plain and the GAN decoder.

Layout is NHWC throughout. Widths follow `TokenizerConfig`: level i has ch * ch_mult[i] channels, level 0 is the finest.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from bitdance_jax.config import TokenizerConfig
from bitdance_jax.errors import UserError
from bitdance_jax.nn import linear
from bitdance_jax.tokenizer import lfq
from bitdance_jax.tokenizer.strips import Whole


GROUPS = 32


class GroupNorm(nn.Module):
    """flax.linen.GroupNorm of 32 groups, in two steps: of the statistics of an image, it makes the function that normalizes its pixels."""

    dtype: DTypeLike = jnp.float32
    affine: bool = True
    rows: Whole = Whole()

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"]) -> Callable[[Array], Array]:
        channels = x.shape[-1:]
        mean, variance = group_statistics(x, self.rows)
        scale = self.param("scale", nn.initializers.ones, channels) if self.affine else None
        bias = self.param("bias", nn.initializers.zeros, channels) if self.affine else None

        def normalize(part: Float[Array, "N H2 W C"]) -> Float[Array, "N H2 W C"]:
            multiplier = jax.lax.rsqrt(variance + 1e-6)
            y = (part - mean) * (multiplier if scale is None else multiplier * scale)
            return (y if bias is None else y + bias).astype(self.dtype)

        return normalize


def group_statistics(
    x: Float[Array, "N H W C"], rows: Whole
) -> tuple[Float32[Array, "N 1 1 C"], Float32[Array, "N 1 1 C"]]:
    """Mean and variance of the group that a channel is in, over all rows of the image."""

    def groups(part: Float[Array, "N H2 W C"]) -> Float32[Array, "N H2 W G E"]:
        return rearrange(part, "n h w (g e) -> n h w g e", g=GROUPS).astype(jnp.float32)

    mean, variance = (
        jnp.repeat(values[..., 0], x.shape[-1] // GROUPS, axis=-1)
        for values in rows.moments(groups, x)
    )
    return mean, variance


def conv3x3(
    features: int, dtype: DTypeLike, use_bias: bool = True, stride: int = 1, name: str | None = None
) -> linear.Conv:
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
    rows: Whole = Whole()

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W D"]:
        norm1, norm2 = (
            GroupNorm(self.dtype, rows=self.rows, name=name) for name in ("norm1", "norm2")
        )
        conv1, conv2 = (
            conv3x3(self.features, self.dtype, use_bias=False, name=name)
            for name in ("conv1", "conv2")
        )
        y = self.rows.convolve(conv1, x, before=swish_of(norm1(x)))
        if x.shape[-1] != self.features:
            x = linear.Conv(
                self.features, (1, 1), use_bias=False, dtype=self.dtype, name="nin_shortcut"
            )(x)
        return self.rows.convolve(conv2, y, before=swish_of(norm2(y)), add=x)


def swish_of(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda x: nn.silu(function(x))


class Encoder(nn.Module):
    """Images in [-1, 1] to values whose signs are the bits."""

    config: TokenizerConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w K"]:
        config = self.config
        widths = [config.ch * m for m in config.ch_mult]
        x = conv3x3(config.ch, self.dtype, use_bias=False, name="conv_in")(images)
        for level, width in enumerate(widths):
            for block in range(config.num_res_blocks):
                x = ResidualBlock(width, self.dtype, name=f"down_{level}_block_{block}")(x)
            if level < len(widths) - 1:
                x = conv3x3(width, self.dtype, stride=2, name=f"down_{level}_downsample")(x)
        for block in range(config.num_res_blocks):
            x = ResidualBlock(widths[-1], self.dtype, name=f"mid_{block}")(x)
        x = nn.silu(GroupNorm(self.dtype, name="norm_out")(x)(x))
        # The last product decides signs: it is made in float32 whatever the compute type.
        return linear.Conv(config.bits, (1, 1), dtype=jnp.float32, name="conv_out")(x)


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm whose scale and shift come from the code's own spread and mean over space, per bit."""

    dtype: DTypeLike = jnp.float32
    rows: Whole = Whole()

    @nn.compact
    def __call__(
        self, x: Float[Array, "N H W C"], style: Float[Array, "N h w K"]
    ) -> Float[Array, "N H W C"]:
        spread = jnp.sqrt(jnp.var(style, axis=(1, 2), ddof=1, keepdims=True) + 1e-6)
        mean = jnp.mean(style, axis=(1, 2), keepdims=True)
        scale = linear.Dense(x.shape[-1], dtype=self.dtype, name="gamma")(spread)
        shift = linear.Dense(x.shape[-1], dtype=self.dtype, name="beta")(mean)
        normalize = GroupNorm(self.dtype, affine=False, rows=self.rows)(x)
        return self.rows.map(lambda part: normalize(part) * scale + shift, x)


def depth_to_space(x: Float[Array, "B H W C4"]) -> Float[Array, "B H2 W2 C"]:
    """2x2 upsampling in DCR order: the channel index is (row offset, column offset, channel)."""
    return rearrange(x, "b h w (r s c) -> b (h r) (w s) c", r=2, s=2)


class Decoder(nn.Module):
    """Codes in {-1, 1} to images, about [-1, 1] (not clipped)."""

    config: TokenizerConfig
    dtype: DTypeLike = jnp.float32
    rows: Whole = Whole()

    @nn.compact
    def __call__(
        self, codes: Float[Array, "B h w K"], noise: Float[Array, "B h w K"] | None = None
    ) -> Float[Array, "B H W C"]:
        config, rows = self.config, self.rows
        widths = [config.ch * m for m in config.ch_mult]
        style = rows.images_of(codes)
        x = rows.split(codes if noise is None else jnp.concatenate([codes, noise], axis=-1))
        x = rows.convolve(conv3x3(widths[-1], self.dtype, name="conv_in"), x)
        for block in range(config.num_res_blocks):
            x = ResidualBlock(widths[-1], self.dtype, rows, name=f"mid_{block}")(x)
        for level in reversed(range(len(widths))):
            x = AdaptiveGroupNorm(self.dtype, rows, name=f"adaptive_{level}")(x, style)
            for block in range(config.num_res_blocks):
                x = ResidualBlock(
                    widths[level], self.dtype, rows, name=f"up_{level}_block_{block}"
                )(x)
            if level > 0:
                x = rows.convolve(
                    conv3x3(4 * widths[level], self.dtype, name=f"up_{level}_upsample"),
                    x,
                    after=depth_to_space,
                )
        norm = GroupNorm(self.dtype, rows=rows, name="norm_out")(x)
        x = rows.convolve(
            conv3x3(config.image_channels, self.dtype, name="conv_out"), x, before=swish_of(norm)
        )
        return rows.join(x)


class Autoencoder(nn.Module):
    """The tokenizer: `encode`, `decode`, and both in a row with straight-through gradients.

    Attributes:
      config: sizes.
      dtype: compute type; parameters are float32, the encoder's output too.
      rows: how the decoder goes through them (`strips.choose`).
    """

    config: TokenizerConfig
    dtype: DTypeLike = jnp.float32
    rows: Whole = Whole()

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype, self.rows)

    def encode(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w K"]:
        """Images in [-1, 1], any height and width divisible by the downsampling, to values before the sign; `lfq.quantize` makes bits."""
        down = self.config.downsampling
        height, width, channels = images.shape[1:]
        if height % down or width % down or channels != self.config.image_channels:
            raise UserError(
                f"the tokenizer takes images of {self.config.image_channels} channels with sides divisible by {down}, "
                f"got {height}x{width} with {channels}; crop or resize them"
            )
        return self.encoder(images)

    def decode(
        self, codes: Float[Array, "B h w K"], noise: Float[Array, "B h w K"] | None = None
    ) -> Float[Array, "B H W C"]:
        """Codes in {-1, 1} to images; the GAN decoder takes standard normal noise of the code's shape, the plain one none."""
        if codes.shape[-1] != self.config.bits:
            raise UserError(
                f"the tokenizer's codes have {self.config.bits} bits, got {codes.shape[-1]}"
            )
        if codes.shape[1] * codes.shape[2] < 2:
            raise UserError(
                "one token is too small an image: the decoder's style is the spread over tokens; give at least two"
            )
        if (noise is not None) != (self.config.decoder == "gan"):
            raise UserError(
                f"a {self.config.decoder} decoder takes {'noise' if noise is None else 'no noise'}"
            )
        return self.decoder(codes, noise)

    def __call__(
        self, images: Float[Array, "B H W C"], noise: Float[Array, "B h w K"] | None = None
    ) -> tuple[Float[Array, "B H W C"], Float[Array, "B h w K"]]:
        """Reconstruction, and the encoder's output before the sign. Gradients pass straight through the sign."""
        z = self.encode(images)
        return self.decode(lfq.quantize_straight_through(z), noise), z


def abstract_params(config: TokenizerConfig) -> dict[str, Any]:
    """Shapes of the parameters, float32, without making any."""
    model, side = Autoencoder(config), config.downsampling
    image = jax.ShapeDtypeStruct((1, side, 2 * side, config.image_channels), jnp.float32)
    noise = (
        jax.ShapeDtypeStruct((1, 1, 2, config.bits), jnp.float32)
        if config.decoder == "gan"
        else None
    )
    return jax.eval_shape(model.init, jax.random.key(0), image, noise)["params"]
