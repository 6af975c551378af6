"""Fused attention of short sequences on TPUs, forward and backward, by Pallas.

A kernel reads queries, keys and values as the projections write them, [B, T, D], with the heads
side by side: nothing is transposed or padded in main memory, and the scores stay in vector memory.
One step of its grid is for one image and the heads of LANES features. All keys of a head are there
at once, so the softmax needs no running maximum. Scores are keys by queries: sums over keys are
sums over rows, which need no shuffles, and most products of the backward pass need no transpose.

Rotary embeddings are applied in the kernel. The backward pass computes the scores again: it stores
nothing but the inputs.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from bitdance_jax.distributed.constraints import map_shards
from bitdance_jax.nn.block import Rotary


LANES = 128
"""Features that a TPU's registers and matrix units take at a time."""

CHUNK = 128
"""Queries whose scores are computed at a time. They see no keys after their last one's block, so
smaller chunks compute fewer scores, and larger ones fewer small products."""


class _Rule(NamedTuple):
    """What a kernel is compiled for: `attention.BlockCausal` and the size of a head."""

    prefix: int
    block: int
    head_dim: int

    def end(self, query: Any) -> Any:
        """The position that a query's attention ends before; of an array of queries, too."""
        if self.block == 1:
            return query + 1
        if isinstance(query, int):
            number = (query - self.prefix) // self.block
            return self.prefix + (number + 1) * self.block if number >= 0 else query + 1
        blocks = jax.lax.div(query - self.prefix, self.block)
        end = self.prefix + (blocks + 1) * self.block
        return jnp.where(query < self.prefix, query + 1, end)


def attend(
    qkv: Sequence[Float[Array, "B T D"]], rotary: Rotary, prefix: int, block: int, num_heads: int
) -> Float[Array, "B T D"]:
    """Rotates queries and keys (`rope.rotate`), then attends; softmax in float32.

    Args:
      qkv: queries, keys and values, of all heads side by side.
      rotary: of the positions, the same in all rows.
      prefix, block: see `attention.BlockCausal`.
      num_heads: of D / num_heads features.
    """
    rule = _Rule(prefix, block, qkv[0].shape[-1] // num_heads)
    return _attend(rule, num_heads, *qkv, rotary)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(rule: _Rule, num_heads: int, q: Array, k: Array, v: Array, rotary: Rotary) -> Array:
    return _on_every_device(_forward, rule, num_heads, (q, k, v), rotary, results=1)[0]


def _attend_forward(
    rule: _Rule, num_heads: int, q: Array, k: Array, v: Array, rotary: Rotary
) -> tuple[Array, Any]:
    return _attend(rule, num_heads, q, k, v, rotary), (q, k, v, rotary)


def _attend_backward(rule: _Rule, num_heads: int, saved: Any, gradient: Array) -> Any:
    *inputs, rotary = saved
    arrays = (*inputs, gradient)
    return *_on_every_device(_backward, rule, num_heads, arrays, rotary, results=3), None


_attend.defvjp(_attend_forward, _attend_backward)


def _on_every_device(
    kernel: Callable[..., None],
    rule: _Rule,
    num_heads: int,
    arrays: tuple[Array, ...],
    rotary: Rotary,
    *,
    results: int,
) -> tuple[Array, ...]:
    """A kernel on each device's images and heads."""
    call = functools.partial(_call, kernel, rule, results=results)
    sizes = {"batch": len(arrays[0]), "heads": num_heads}
    axes = ("batch", None, "heads")
    tables = _rotary_tables(rotary, rule.head_dim)
    return map_shards(
        call,
        sizes,
        (*[axes] * len(arrays), *[(None, None)] * len(tables)),
        [axes] * results,
        *arrays,
        *tables,
    )


def _call(
    kernel: Callable[..., None], rule: _Rule, *arrays: Array, results: int
) -> tuple[Array, ...]:
    """A kernel for arrays [B, T, D] and tables [T, F]: `results` arrays [B, T, D]."""
    arrays, single_head = arrays[:-3], arrays[-3:]
    batch, length, dim = arrays[0].shape
    lanes = math.lcm(rule.head_dim, LANES)
    lanes = lanes if dim % lanes == 0 else dim
    tables = [jnp.tile(table, (1, lanes // rule.head_dim)) for table in single_head]
    heads = pl.BlockSpec((None, length, lanes), lambda image, group: (image, 0, group))
    everywhere = pl.BlockSpec((length, lanes), lambda image, group: (0, 0))
    pairs = sum(rows.size * keys for rows, keys in _chunks(rule, length))
    num_heads = dim // rule.head_dim
    products = 2 if results == 1 else 5
    call = pl.pallas_call(
        functools.partial(kernel, rule),
        grid=(batch, dim // lanes),
        in_specs=[everywhere] * 3 + [heads] * len(arrays),
        out_specs=[heads] * results,
        out_shape=[jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)] * results,
        scratch_shapes=[pltpu.VMEM((length, lanes), jnp.float32)] * (results - 1),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            # The products read the features of all heads of the block, zeros but for one.
            flops=2 * products * batch * num_heads * pairs * lanes,
            transcendentals=batch * num_heads * pairs,
            bytes_accessed=(len(arrays) + results) * arrays[0].nbytes,
        ),
        name=f"tpu_attention{kernel.__name__}",
    )
    return tuple(call(*tables, *arrays))


def _rotary_tables(rotary: Rotary, head_dim: int) -> list[Float[Array, "T F"]]:
    """Factors of a head's features, of those to their right and of those to their left."""
    cos, sin = rotary
    none = jnp.zeros_like(sin)
    parts = ((cos, cos), (-sin, none), (none, sin))
    return [jnp.concatenate(part, axis=-1).astype(jnp.float32) for part in parts]


def _forward(
    rule: _Rule, cos: Any, left: Any, right: Any, q: Any, k: Any, v: Any, out: Any
) -> None:
    """Writes the attention of one image and group of heads; all are references, [T, L]."""
    tables = (cos[...], left[...], right[...])
    dtype = q.dtype
    scale = rule.head_dim**-0.5
    queries = (_rotate(q[...], tables, rule) * scale).astype(dtype)
    all_keys = _rotate(k[...], tables, rule).astype(dtype)
    for rows, keys in _chunks(rule, len(q)):
        visible = _visible(rule, rows, keys)
        total = jnp.zeros((q.shape[1], rows.size), jnp.float32)
        for head in range(q.shape[1] // rule.head_dim):
            one = functools.partial(_only, head, rule.head_dim)
            scores = _product(all_keys[:keys], one(queries[rows.slice]), (1, 1))
            weights, sums = _softmax(scores, visible)
            total += _product(one(v[:keys]), weights.astype(dtype), (0, 0)) / sums
        out[rows.slice] = total.T.astype(dtype)


def _backward(
    rule: _Rule,
    cos: Any,
    left: Any,
    right: Any,
    q: Any,
    k: Any,
    v: Any,
    gradient: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    dk_sum: Any,
    dv_sum: Any,
) -> None:
    """Writes the gradients of one image and group of heads; all are references, [T, L]."""
    tables = (cos[...], left[...], right[...])
    dtype = q.dtype
    scale = rule.head_dim**-0.5
    queries = (_rotate(q[...], tables, rule) * scale).astype(dtype)
    all_keys = _rotate(k[...], tables, rule).astype(dtype)
    dk_sum[...] = jnp.zeros_like(dk_sum)
    dv_sum[...] = jnp.zeros_like(dv_sum)
    for rows, keys in _chunks(rule, len(q)):
        visible = _visible(rule, rows, keys)
        key, value = all_keys[:keys], v[:keys]
        sum_q = jnp.zeros((q.shape[1], rows.size), jnp.float32)
        sum_k = sum_v = jnp.zeros((keys, q.shape[1]), jnp.float32)
        for head in range(q.shape[1] // rule.head_dim):
            one = functools.partial(_only, head, rule.head_dim)
            query, out = one(queries[rows.slice]), one(gradient[rows.slice])
            weights, sums = _softmax(_product(key, query, (1, 1)), visible)
            weights *= 1 / sums
            weighted = weights * _product(value, out, (1, 1))
            scores = weighted - weights * jnp.sum(weighted, axis=0, keepdims=True)
            scores = scores.astype(dtype)
            sum_v += _product(weights.astype(dtype), out, (1, 0))
            sum_k += _product(scores, query, (1, 0))
            sum_q += _product(one(key), scores, (0, 0))
        dv_sum[:keys] += sum_v
        dk_sum[:keys] += sum_k
        here = [table[rows.slice] for table in tables]
        dq[rows.slice] = (_rotate(sum_q.T, here, rule, back=True) * scale).astype(dtype)
    dk[...] = _rotate(dk_sum[...], tables, rule, back=True).astype(dtype)
    dv[...] = dv_sum[...].astype(dtype)


class _Rows(NamedTuple):
    """Queries of a chunk."""

    start: int
    size: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.size)


def _chunks(rule: _Rule, length: int) -> Iterator[tuple[_Rows, int]]:
    """Chunks of queries, and how many first keys they see."""
    for start in range(0, length, CHUNK):
        size = min(CHUNK, length - start)
        yield _Rows(start, size), min(rule.end(start + size - 1), length)


def _visible(rule: _Rule, rows: _Rows, keys: int) -> Array:
    """Which of the first keys each query sees, bool [keys, queries]."""
    shape = (keys, rows.size)
    query = rows.start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0) < rule.end(query)


def _softmax(scores: Array, visible: Array) -> tuple[Array, Array]:
    """Weights [keys, queries] before normalization, and their sums [1, queries]."""
    scores = jnp.where(visible, scores, -1e30)
    weights = jnp.exp(scores - jnp.max(scores, axis=0, keepdims=True))
    return weights, jnp.sum(weights, axis=0, keepdims=True)


def _product(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Product summed over one axis of each, in float32."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _only(head: int, head_dim: int, x: Array) -> Array:
    """Features [n, L] of several heads, with zeros in place of all heads but one.

    A product over L features then takes as long as over those of one head of less than LANES, and
    nothing moves between lanes.
    """
    if x.shape[1] == head_dim:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    inside = (lane >= head * head_dim) & (lane < (head + 1) * head_dim)
    return jnp.where(inside, x, jnp.zeros_like(x))


def _rotate(x: Array, tables: Any, rule: _Rule, *, back: bool = False) -> Array:
    """`rope.rotate` of heads side by side, or its inverse; float32."""
    cos, left, right = tables
    x = x.astype(jnp.float32)
    half = rule.head_dim // 2
    turned = pltpu.roll(x, x.shape[1] - half, 1) * left + pltpu.roll(x, half, 1) * right
    return x * cos - turned if back else x * cos + turned
