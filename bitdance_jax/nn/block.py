"""The pre-norm transformer block, whose attention and MLP are given."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from bitdance_jax.distributed.constraints import constrain
from bitdance_jax.nn.attention import KVCache, Mask


Rotary = tuple[Float[Array, "*#B Q half"], Float[Array, "*#B Q half"]]
"""Cosines and sines of the new tokens' positions, shared by the rows or not; half = F / 2."""


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with RMSNorm.

    Attributes:
      make_attention: name -> module (x, rotary, mask, cache, start) -> (y, cache).
      make_mlp: name -> module x -> y.
      norm_eps: of both norms.
      dtype: compute type.
    """

    make_attention: Callable[..., nn.Module]
    make_mlp: Callable[..., nn.Module]
    norm_eps: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B Q D"],
        rotary: Rotary,
        mask: Mask | None,
        cache: KVCache | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B Q D"], KVCache | None]:
        """The new tokens' states, and the cache with them: carry and output of a scan."""
        y = nn.RMSNorm(self.norm_eps, dtype=self.dtype, name="attention_norm")(x)
        y, cache = self.make_attention(name="attention")(y, rotary, mask, cache, start)
        x = x + y
        y = nn.RMSNorm(self.norm_eps, dtype=self.dtype, name="mlp_norm")(x)
        return constrain(x + self.make_mlp(name="mlp")(y), "batch", None, None), cache


def split_heads(x: Float[Array, "B Q D"], num_heads: int) -> Float[Array, "B A Q F"]:
    """Features to attention heads, sharded over the heads."""
    heads = rearrange(x, "b q (a f) -> b a q f", a=num_heads)
    return constrain(heads, "batch", "heads", None, None)


def merge_heads(x: Float[Array, "B A Q F"]) -> Float[Array, "B Q D"]:
    """Inverse of `split_heads`."""
    return rearrange(x, "b a q f -> b q (a f)")
