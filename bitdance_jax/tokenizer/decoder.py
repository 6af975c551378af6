"""The CNN decoder from bits to images, plain and GAN (paper 3.1)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bitdance_jax.config import TokenizerConfig
from bitdance_jax.tokenizer.layers import (
    AdaptiveGroupNorm,
    GroupNorm,
    Remat,
    conv3x3,
    depth_to_space,
    residual_block,
)


class Decoder(nn.Module):
    """Codes in {-1, 1} to images, about [-1, 1] (not clipped).

    The GAN decoder also reads noise, of the shape of the codes, as further channels. `strips`
    computes the same from the same parameters with less memory.
    """

    config: TokenizerConfig
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self, codes: Float[Array, "B h w K"], noise: Float[Array, "B h w K"] | None = None
    ) -> Float[Array, "B H W C"]:
        config = self.config
        x = codes if noise is None else jnp.concatenate([codes, noise], axis=-1)
        x = conv3x3(config.ch * config.ch_mult[-1], self.dtype, name="conv_in")(x)
        return decode_levels(config, self.dtype, x, codes, self.remat)


def decode_levels(
    config: TokenizerConfig,
    dtype: DTypeLike,
    x: Float[Array, "B h w C"],
    codes: Float[Array, "B h w K"],
    remat: Remat,
) -> Float[Array, "B H W D"]:
    """What follows `conv_in`, as submodules of the caller: mid blocks, levels, last convolution."""
    widths = [config.ch * m for m in config.ch_mult]
    block_of = residual_block(remat)
    for block in range(config.num_res_blocks):
        x = block_of(widths[-1], dtype, name=f"mid_{block}")(x)
    for level in reversed(range(len(widths))):
        x = AdaptiveGroupNorm(dtype, name=f"adaptive_{level}")(x, codes)
        for block in range(config.num_res_blocks):
            x = block_of(widths[level], dtype, name=f"up_{level}_block_{block}")(x)
        if level > 0:
            x = conv3x3(4 * widths[level], dtype, name=f"up_{level}_upsample")(x)
            x = depth_to_space(x)
    x = nn.silu(GroupNorm(dtype, name="norm_out")(x))
    return conv3x3(config.image_channels, dtype, name="conv_out")(x)
