"""Attention: masks, the key-value cache, and the one place that chooses the kernel."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


Kernel = Literal["xla", "cudnn"]


def block_causal_mask(total: int, prefix: int, block: int) -> np.ndarray:
    """Which key (column) a query (row) sees, bool [total, total]: causal, and all of its own block (paper 3.3).

    The first `prefix` tokens are plainly causal; from there on every `block` tokens form a block. block = 1 is plain causal attention.
    """
    position = np.arange(total)
    block_of = np.where(position < prefix, -1 - position, (position - prefix) // block)
    return (position[:, None] >= position[None, :]) | (block_of[:, None] == block_of[None, :])


class KVCache(NamedTuple):
    """Keys and values of one layer for a fixed number of positions: [B, T, N, D] each."""

    k: Float[Array, "B T N D"]
    v: Float[Array, "B T N D"]


def empty_cache(batch: int, length: int, num_heads: int, head_dim: int, dtype: jnp.dtype) -> KVCache:
    shape = (batch, length, num_heads, head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write_cache(cache: KVCache, k: Float[Array, "B S N D"], v: Float[Array, "B S N D"], start: Int[Array, ""] | int) -> KVCache:
    """The cache with S new positions written from `start` on."""
    return KVCache(
        jax.lax.dynamic_update_slice_in_dim(cache.k, k.astype(cache.k.dtype), start, axis=1),
        jax.lax.dynamic_update_slice_in_dim(cache.v, v.astype(cache.v.dtype), start, axis=1),
    )


def attend(
    q: Float[Array, "B S N D"],
    k: Float[Array, "B T M D"],
    v: Float[Array, "B T M D"],
    mask: Bool[Array, "S T"] | Bool[np.ndarray, "S T"] | None,
    kernel: Kernel = "xla",
) -> Float[Array, "B S N D"]:
    """Scaled dot-product attention with softmax in float32. M key heads serve N query heads (N a multiple of M)."""
    mask = None if mask is None else jnp.asarray(mask)[None, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=kernel)
