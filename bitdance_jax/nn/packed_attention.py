"""Attention within documents that are packed into one row (paper 3.3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int


CHUNK = 256
"""At most so many queries' scores are in memory at a time."""


class PackedMask(NamedTuple):
    """Which keys a query sees: those of its own document before its limit.

    Attributes:
      documents: number of the document of each position.
      limits: position that a query's attention ends before: after the query itself, or after the
        last token of its block.
    """

    documents: Int[Array, "B S"] | Int[np.ndarray, "B S"]
    limits: Int[Array, "B S"] | Int[np.ndarray, "B S"]

    def array(self) -> Bool[Array, "B S S"]:
        """Query by key."""
        return _visible(self, jnp.asarray(self.documents), jnp.asarray(self.limits))


def attend_packed(
    q: Float[Array, "B M S D"],
    k: Float[Array, "B G S D"],
    v: Float[Array, "B G S D"],
    mask: PackedMask,
) -> Float[Array, "B M S D"]:
    """Scaled dot-product attention with softmax in float32.

    Scores of at most CHUNK queries are in memory at a time, in the backward pass too.

    Args:
      q: of M heads.
      k, v: of G heads, each for M / G neighbouring heads of `q`.
      mask: see `PackedMask`.
    """
    length = q.shape[2]
    chunks = -(-length // CHUNK)
    padding = -length % chunks
    queries = jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0)))
    # Queries of the padding see nothing and are dropped.
    documents = jnp.pad(jnp.asarray(mask.documents), ((0, 0), (0, padding)), constant_values=-2)
    limits = jnp.pad(jnp.asarray(mask.limits), ((0, 0), (0, padding)))

    @jax.checkpoint
    def attend_chunk(chunk: tuple[Array, Array, Array]) -> Array:
        queries, documents, limits = chunk
        visible = _visible(mask, documents, limits)[:, None, None]
        heads = rearrange(
            queries * queries.shape[-1] ** -0.5, "b (g h) c d -> b g h c d", g=k.shape[1]
        )
        scores = jnp.einsum("bghcd,bgsd->bghcs", heads, k, preferred_element_type=jnp.float32)
        scores = jnp.where(visible, scores, -1e30)
        largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - largest)
        out = jnp.einsum(
            "bghcs,bgsd->bghcd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        out = (out / jnp.sum(weights, axis=-1, keepdims=True)).astype(q.dtype)
        return rearrange(out, "b g h c d -> b (g h) c d")

    parts = (
        rearrange(queries, "b m (n c) d -> n b m c d", n=chunks),
        rearrange(documents, "b (n c) -> n b c", n=chunks),
        rearrange(limits, "b (n c) -> n b c", n=chunks),
    )
    out = jax.lax.map(attend_chunk, parts)
    return rearrange(out, "n b m c d -> b m (n c) d")[:, :, :length]


def _visible(
    mask: PackedMask, documents: Int[Array, "B C"], limits: Int[Array, "B C"]
) -> Bool[Array, "B C S"]:
    """Which of all keys these queries see."""
    keys = jnp.asarray(mask.documents)
    before_limit = jnp.arange(keys.shape[1]) < limits[..., None]
    return before_limit & (documents[..., None] == keys[:, None, :])
