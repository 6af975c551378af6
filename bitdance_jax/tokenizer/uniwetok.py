"""UniWeTok: attention between tokens at the coarsest level (arXiv 2602.14178).

Encoder and decoder are those of the CNN tokenizer (paper 3.1) but for what is said here.
"""

import functools
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bitdance_jax.config import TokenizerConfig
from bitdance_jax.config.model import swiglu_width
from bitdance_jax.errors import UserError
from bitdance_jax.nn import linear, rope
from bitdance_jax.nn.block import PreNormBlock
from bitdance_jax.nn.layers import SwiGLU
from bitdance_jax.nn.self_attention import SelfAttention
from bitdance_jax.tokenizer.decoder import decode_levels
from bitdance_jax.tokenizer.layers import GroupNorm, Remat, conv3x3, residual_block


REGISTERS = 4
"""Learnt tokens in front of those of the image."""

ROPE_BASE = 10000.0
NORM_EPS = 1e-6
EXTENT = 7.0
"""Positions span this much whatever the size: those of an 8 x 8 grid, for which it was trained."""

Side = Literal["encoder", "decoder"]


class Encoder(nn.Module):
    """Images in [-1, 1] to values in (-1, 1) before the sign.

    The strided convolutions change the width, not the residual blocks; transformer blocks stand in
    for the residual ones in the middle; and there is no swish before the last convolution.
    """

    config: TokenizerConfig
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w K"]:
        config = self.config
        block_of = residual_block(self.remat)
        widths = [config.ch * m for m in config.ch_mult]
        x = conv3x3(widths[0], self.dtype, use_bias=False, name="conv_in")(images)
        for level, width in enumerate(widths):
            for block in range(config.num_res_blocks):
                x = block_of(width, self.dtype, name=f"down_{level}_block_{block}")(x)
            if level < len(widths) - 1:
                name = f"down_{level}_downsample"
                x = conv3x3(widths[level + 1], self.dtype, stride=2, name=name)(x)
        x = AttentionBlocks(config, "encoder", self.dtype, name="mid_attention")(x)
        x = GroupNorm(self.dtype, name="norm_out")(x)
        # The last product decides signs: it is computed in float32 whatever the compute type.
        x = linear.Conv(config.bits, (1, 1), dtype=jnp.float32, name="conv_out")(x)
        return 2 * nn.sigmoid(x) - 1


class Decoder(nn.Module):
    """Codes in {-1, 1} and noise of their shape to images, about [-1, 1] (not clipped)."""

    config: TokenizerConfig
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self, codes: Float[Array, "B h w K"], noise: Float[Array, "B h w K"]
    ) -> Float[Array, "B H W C"]:
        width = self.config.ch * self.config.ch_mult[-1]
        x = jnp.concatenate([codes, noise], axis=-1)
        x = conv3x3(width, self.dtype, name="conv_in")(x)
        x = AttentionBlocks(self.config, "decoder", self.dtype, name="mid_attention")(x)
        return decode_levels(self.config, self.dtype, x, codes, self.remat)


class AttentionBlocks(nn.Module):
    """Pre-norm transformer blocks over registers and all positions of an image."""

    config: TokenizerConfig
    side: Side
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        config = self.config
        batch, height, width, dim = x.shape
        registers = self.param("registers", nn.initializers.normal(0.02), (REGISTERS, dim))
        tokens = rearrange(x, "b h w c -> b (h w) c").astype(jnp.float32)
        front = jnp.broadcast_to(registers.astype(jnp.float32), (batch, REGISTERS, dim))
        tokens = jnp.concatenate([front, tokens], axis=1)
        angles = rotary_angles(height, width, dim // config.attention_heads, self.side)
        rotary = (jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles)))
        for number in range(config.attention_blocks):
            block = PreNormBlock(
                functools.partial(SelfAttention, dim, config.attention_heads, self.dtype),
                functools.partial(SwiGLU, swiglu_width(dim), dim, use_bias=False, dtype=self.dtype),
                NORM_EPS,
                self.dtype,
                name=f"blocks_{number}",
            )
            tokens, _ = block(tokens, rotary, None)
        return rearrange(tokens[:, REGISTERS:], "b (h w) c -> b h w c", h=height).astype(x.dtype)


def rotary_angles(height: int, width: int, head_dim: int, side: Side) -> np.ndarray:
    """Angles [registers + h w, head_dim / 2] of every token; those of the registers are 0.

    Raises:
      UserError: one row or column of tokens, which the encoder's positions do not define.
    """
    if side == "encoder" and min(height, width) < 2:
        raise UserError(
            f"UniWeTok encodes images of at least two tokens a side, got {height}x{width}; "
            "take a larger image"
        )
    rows = positions(height, side)
    columns = positions(width, side)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    # An angle is (position + 1) * frequency.
    xy = np.stack([x.ravel(), y.ravel()], axis=-1) + 1
    angles = rope.rotary_angles_2d(xy.astype(np.float32), head_dim, ROPE_BASE)
    return np.concatenate([np.zeros((REGISTERS, head_dim // 2), np.float32), angles])


def positions(count: int, side: Side) -> np.ndarray:
    """Positions of `count` columns, or rows."""
    index = np.arange(count)
    if side == "encoder":
        return EXTENT * index / (count - 1) + 0.5
    return (index + 0.5) * (EXTENT + 0.5) / (count - 0.5)
