"""The CNN decoder from bits to images, plain and GAN (paper 3.1)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bitdance_jax.config import TokenizerConfig
from bitdance_jax.tokenizer.layers import (
    AdaptiveGroupNorm,
    GroupNorm,
    ResidualBlock,
    conv3x3,
    depth_to_space,
)


class Decoder(nn.Module):
    """Codes in {-1, 1} to images, about [-1, 1] (not clipped).

    The GAN decoder also reads noise, of the shape of the codes, as further channels. `strips` computes
    the same from the same parameters with less memory.
    """

    config: TokenizerConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, codes: Float[Array, "B h w K"], noise: Float[Array, "B h w K"] | None = None
    ) -> Float[Array, "B H W C"]:
        config = self.config
        widths = [config.ch * m for m in config.ch_mult]
        x = codes if noise is None else jnp.concatenate([codes, noise], axis=-1)
        x = conv3x3(widths[-1], self.dtype, name="conv_in")(x)
        for block in range(config.num_res_blocks):
            x = ResidualBlock(widths[-1], self.dtype, name=f"mid_{block}")(x)
        for level in reversed(range(len(widths))):
            x = AdaptiveGroupNorm(self.dtype, name=f"adaptive_{level}")(x, codes)
            for block in range(config.num_res_blocks):
                x = ResidualBlock(widths[level], self.dtype, name=f"up_{level}_block_{block}")(x)
            if level > 0:
                x = conv3x3(4 * widths[level], self.dtype, name=f"up_{level}_upsample")(x)
                x = depth_to_space(x)
        x = nn.silu(GroupNorm(self.dtype, name="norm_out")(x))
        return conv3x3(config.image_channels, self.dtype, name="conv_out")(x)
