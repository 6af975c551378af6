"""The kernels of `tpu_attention`: one image and group of heads, in a TPU's vector memory.

T positions have L features, of one or several heads side by side. All keys of a head are there at
once, so the softmax needs no running maximum. Scores are keys by queries: sums over keys are sums
over rows, which need no shuffles, and most products of the backward pass need no transpose.

Each step is written for all heads of a group of chunks before the next step: so the compiler finds
independent work for all units at any time.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array


CHUNK = 128
"""Queries of a product. They see no keys after their last one's block, so smaller chunks compute
fewer scores, and larger ones fewer small products."""

GROUP = 3
"""Chunks whose scores are in vector memory at the same time."""


class Rule(NamedTuple):
    """What a kernel is compiled for: `attention.BlockCausal` and the size of a head."""

    prefix: int
    block: int
    head_dim: int

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.head_dim**-0.5

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


def forward(rule: Rule, cos: Any, left: Any, right: Any, q: Any, k: Any, v: Any, out: Any) -> None:
    """Writes the attention of one image and group of heads; all are references, [T, L]."""
    tables = (cos[...], left[...], right[...])
    all_keys = _rotate(rule, k[...], tables).astype(q.dtype)
    queries = _heads(rule, _scaled_queries(rule, q, tables))
    values = _heads(rule, v[...])
    for group in _groups(rule, len(q)):
        parts = [(*chunk, head) for chunk in group for head in range(len(values))]
        scores = [
            _product(all_keys[:keys], queries[head][rows.slice], (1, 1))
            for rows, keys, head in parts
        ]
        weights = [_softmax(rule, *part) for part in zip(parts, scores, strict=True)]
        for (rows, keys), of_heads in _by_chunk(group, weights):
            total = jnp.zeros((q.shape[1], rows.size), jnp.float32)
            for value, (weight, norm) in zip(values, of_heads, strict=True):
                total += _product(value[:keys], weight.astype(q.dtype), (0, 0)) * (1 / norm)
            out[rows.slice] = total.T.astype(q.dtype)


def backward(
    rule: Rule,
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
    """Writes the gradients of one image and group of heads; all are references, [T, L].

    `dk_sum` and `dv_sum` are float32 memory.
    """
    tables = (cos[...], left[...], right[...])
    all_keys = _rotate(rule, k[...], tables).astype(q.dtype)
    queries, outs, keys_of = (
        _heads(rule, x) for x in (_scaled_queries(rule, q, tables), gradient[...], all_keys)
    )
    dk_sum[...] = jnp.zeros_like(dk_sum)
    dv_sum[...] = jnp.zeros_like(dv_sum)
    for group in _groups(rule, len(q)):
        parts = [(*chunk, head) for chunk in group for head in range(len(outs))]
        products = [
            (
                _product(all_keys[:keys], queries[head][rows.slice], (1, 1)),
                _product(v[:keys], outs[head][rows.slice], (1, 1)),
            )
            for rows, keys, head in parts
        ]
        gradients = [
            _softmax_gradient(rule, part, *both, dtype=q.dtype)
            for part, both in zip(parts, products, strict=True)
        ]
        for (rows, keys), of_heads in _by_chunk(group, gradients):
            of_queries = jnp.zeros((q.shape[1], rows.size), jnp.float32)
            of_keys = of_values = jnp.zeros((keys, q.shape[1]), jnp.float32)
            for head, (weights, scores) in enumerate(of_heads):
                of_values += _product(weights, outs[head][rows.slice], (1, 0))
                of_keys += _product(scores, queries[head][rows.slice], (1, 0))
                of_queries += _product(keys_of[head][:keys], scores, (0, 0))
            dv_sum[:keys] += of_values
            dk_sum[:keys] += of_keys
            here = [table[rows.slice] for table in tables]
            unscaled = _rotate(rule, of_queries.T, here, back=True)
            dq[rows.slice] = (unscaled * rule.scale).astype(q.dtype)
    dk[...] = _rotate(rule, dk_sum[...], tables, back=True).astype(q.dtype)
    dv[...] = dv_sum[...].astype(q.dtype)


class _Rows(NamedTuple):
    """Neighbouring queries."""

    start: int
    size: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.size)


_Chunk = tuple[_Rows, int]
"""Queries, and how many first keys they see."""


def chunks(rule: Rule, length: int) -> Iterator[_Chunk]:
    for start in range(0, length, CHUNK):
        size = min(CHUNK, length - start)
        yield _Rows(start, size), min(rule.end(start + size - 1), length)


def _groups(rule: Rule, length: int) -> Iterator[list[_Chunk]]:
    all_chunks = list(chunks(rule, length))
    for start in range(0, len(all_chunks), GROUP):
        yield all_chunks[start : start + GROUP]


def _by_chunk(group: list[_Chunk], results: list[Any]) -> Iterator[tuple[_Chunk, list[Any]]]:
    """Each chunk with the results of its heads."""
    num_heads = len(results) // len(group)
    for number, chunk in enumerate(group):
        yield chunk, results[number * num_heads : (number + 1) * num_heads]


_Part = tuple[_Rows, int, int]
"""A chunk of queries, how many first keys it sees, and a head."""


def _visible(rule: Rule, rows: _Rows, keys: int) -> Array:
    """Which of the first keys each query sees, bool [keys, queries]."""
    shape = (keys, rows.size)
    query = rows.start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0) < rule.end(query)


def _softmax(rule: Rule, part: _Part, scores: Array) -> tuple[Array, Array]:
    """Weights [keys, queries] before normalization, and their sums [1, queries]."""
    rows, keys, _ = part
    scores = jnp.where(_visible(rule, rows, keys), scores, -1e30)
    weights = jnp.exp(scores - jnp.max(scores, axis=0, keepdims=True))
    return weights, jnp.sum(weights, axis=0, keepdims=True)


def _softmax_gradient(
    rule: Rule, part: _Part, scores: Array, gradient: Array, *, dtype: Any
) -> tuple[Array, Array]:
    """Weights and gradient of the scores [keys, queries], from the gradient of the weights."""
    weights, sums = _softmax(rule, part, scores)
    weights *= 1 / sums
    weighted = weights * gradient
    scores = weighted - weights * jnp.sum(weighted, axis=0, keepdims=True)
    return weights.astype(dtype), scores.astype(dtype)


def _product(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Product summed over one axis of each, in float32."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _heads(rule: Rule, x: Array) -> list[Array]:
    """For each head, features [T, L] with zeros in place of all other heads.

    A product over L features then takes as long as over those of one head of less than LANES, and
    nothing moves between lanes.
    """
    size = rule.head_dim
    if x.shape[1] == size:
        return [x]
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return [
        jnp.where((lane >= start) & (lane < start + size), x, jnp.zeros_like(x))
        for start in range(0, x.shape[1], size)
    ]


def _scaled_queries(rule: Rule, q: Any, tables: Any) -> Array:
    return (_rotate(rule, q[...], tables) * rule.scale).astype(q.dtype)


def _rotate(rule: Rule, x: Array, tables: Any, *, back: bool = False) -> Array:
    """`rope.rotate` of heads side by side, or its inverse; float32."""
    cos, left, right = tables
    x = x.astype(jnp.float32)
    half = rule.head_dim // 2
    turned = pltpu.roll(x, x.shape[1] - half, 1) * left + pltpu.roll(x, half, 1) * right
    return x * cos - turned if back else x * cos + turned
