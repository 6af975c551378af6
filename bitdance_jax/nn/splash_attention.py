"""Attention of packed documents on TPUs by JAX's kernel, "splash attention".

The kernel computes its mask from a number of each query and the position of each key, and from
documents. The number is the query's limit here. So no array of queries by keys exists, and blocks
of keys that no query of a block sees are neither read nor computed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    DEFAULT_MASK_VALUE,
    BlockSizes,
    SegmentIds,
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Float, Int

from bitdance_jax.distributed.constraints import map_shards
from bitdance_jax.nn.packed_attention import PackedMask


BLOCK = 1024
"""The most queries, and keys, of a step of the kernel's grid."""

COMPUTED = (512, 384, 256, 128)
"""Keys whose scores are in vector memory at a time: the first of these that divides a block."""


def attend_packed(
    q: Float[Array, "B M S D"],
    k: Float[Array, "B G S D"],
    v: Float[Array, "B G S D"],
    mask: PackedMask,
) -> Float[Array, "B M S D"]:
    """As `packed_attention.attend_packed`. A document's positions must follow each other."""
    heads = ("batch", "heads", None, None)
    rows = ("batch", None)
    sizes = {"batch": len(q), "heads": k.shape[1]}
    documents, limits = (jnp.asarray(part, jnp.int32) for part in mask)
    inputs = (heads, heads, heads, rows, rows)
    return map_shards(_attend_rows, sizes, inputs, [heads], q, k, v, documents, limits)[0]


def _attend_rows(q: Array, k: Array, v: Array, documents: Array, limits: Array) -> tuple[Array]:
    return (jax.lax.map(lambda row: _attend_row(*row), (q, k, v, documents, limits)),)


def _attend_row(
    q: Float[Array, "M S D"],
    k: Float[Array, "G S D"],
    v: Float[Array, "G S D"],
    documents: Int[Array, "S"],
    limits: Int[Array, "S"],
) -> Float[Array, "M S D"]:
    length = q.shape[1]
    block = _block(length)
    padding = -length % block
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0))) for x in (q, k, v))
    # The padding is a document of its own, in which each query sees itself.
    documents = jnp.pad(documents, (0, padding), constant_values=-2)
    limits = jnp.concatenate([limits, jnp.arange(length, length + padding, dtype=jnp.int32) + 1])
    blocks = _visible_blocks(documents, limits, block)
    kernel = _kernel(blocks, limits, block)
    out: Any = kernel(q * q.shape[-1] ** -0.5, k, v, SegmentIds(documents, documents))
    return out[:, :length]


def _block(length: int) -> int:
    """A multiple of 128 up to BLOCK, which leaves little padding."""
    count = -(-length // BLOCK)
    return -(-length // (128 * count)) * 128


def _before_limit(limit: Array, key: Array) -> Array:
    return key < limit


class _Blocks(NamedTuple):
    """Blocks of queries [n] by blocks of keys [n].

    Attributes:
      visible: whether a query of the one may see a key of the other.
      next_keys: the block of keys to read: the next visible one, or the last.
      next_queries: likewise, the block of queries.
    """

    visible: Int[Array, "1 n n"]
    next_keys: Int[Array, "1 n n"]
    next_queries: Int[Array, "1 n n"]


def _visible_blocks(documents: Int[Array, "S"], limits: Int[Array, "S"], block: int) -> _Blocks:
    position = jnp.arange(len(documents), dtype=jnp.int32)
    first = jnp.concatenate([jnp.ones(1, bool), documents[1:] != documents[:-1]])
    document_start = jax.lax.cummax(jnp.where(first, position, 0))
    start = jnp.min(document_start.reshape(-1, block), axis=1)
    end = jnp.max(limits.reshape(-1, block), axis=1)
    number = jnp.arange(len(start), dtype=jnp.int32)
    visible = (number * block < end[:, None]) & ((number + 1) * block > start[:, None])
    last_key = jnp.minimum(-(-end // block), len(start)) - 1
    next_keys = jnp.clip(number[None, :], (start // block)[:, None], last_key[:, None])
    # The blocks of queries that see a block of keys follow each other, too.
    first_query = jnp.argmax(visible, axis=0).astype(jnp.int32)
    last_query = len(start) - 1 - jnp.argmax(visible[::-1], axis=0).astype(jnp.int32)
    next_queries = jnp.clip(number[:, None], first_query[None, :], last_query[None, :])
    return _Blocks(visible.astype(jnp.int32)[None], next_keys[None], next_queries[None])


def _kernel(blocks: _Blocks, limits: Int[Array, "S"], block: int) -> SplashAttentionKernel:
    def info(data_next: Array) -> MaskInfo:
        numbers: Any = limits
        return MaskInfo(
            data_next=data_next,
            mask_next=None,
            block_mask=blocks.visible,
            partial_mask_blocks=None,
            q_sequence=numbers,
        )

    computed = next(size for size in COMPUTED if block % size == 0)
    sizes = BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=computed,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=computed,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return SplashAttentionKernel(
        info(blocks.next_keys),
        info(blocks.next_keys),
        info(blocks.next_queries),
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=_before_limit,
        interpret=False,
    )
