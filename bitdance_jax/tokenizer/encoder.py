"""The CNN encoder from images to values whose signs are the bits (paper 3.1)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bitdance_jax.config import TokenizerConfig
from bitdance_jax.nn import linear
from bitdance_jax.tokenizer.layers import GroupNorm, Remat, conv3x3, residual_block


class Encoder(nn.Module):
    """Images in [-1, 1] to values before the sign.

    Level i has ch * ch_mult[i] channels; level 0 is the finest.
    """

    config: TokenizerConfig
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w K"]:
        config = self.config
        block_of = residual_block(self.remat)
        widths = [config.ch * m for m in config.ch_mult]
        x = conv3x3(config.ch, self.dtype, use_bias=False, name="conv_in")(images)
        for level, width in enumerate(widths):
            for block in range(config.num_res_blocks):
                x = block_of(width, self.dtype, name=f"down_{level}_block_{block}")(x)
            if level < len(widths) - 1:
                x = conv3x3(width, self.dtype, stride=2, name=f"down_{level}_downsample")(x)
        for block in range(config.num_res_blocks):
            x = block_of(widths[-1], self.dtype, name=f"mid_{block}")(x)
        x = nn.silu(GroupNorm(self.dtype, name="norm_out")(x))
        # The last product decides signs: it is computed in float32 whatever the compute type.
        return linear.Conv(config.bits, (1, 1), dtype=jnp.float32, name="conv_out")(x)
