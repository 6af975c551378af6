"""Fused attention of short sequences on TPUs, forward and backward, by Pallas.

A kernel reads queries, keys and values as the projections write them, [B, T, D], with the heads
side by side: nothing is transposed or padded in main memory, and the scores stay in vector memory.
One step of its grid is for one image and the heads of LANES features
(`tpu_attention_kernels`).

Rotary embeddings are applied in the kernel. The backward pass computes the scores again: it stores
nothing but the inputs.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from bitdance_jax.distributed.constraints import map_shards
from bitdance_jax.nn.block import Rotary
from bitdance_jax.nn.tpu_attention_kernels import Rule, backward, chunks, forward


LANES = 128
"""Features that a TPU's registers and matrix units take at a time."""


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
    rule = Rule(prefix, block, qkv[0].shape[-1] // num_heads)
    return _attend(rule, num_heads, *qkv, rotary)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(rule: Rule, num_heads: int, q: Array, k: Array, v: Array, rotary: Rotary) -> Array:
    return _on_every_device(forward, rule, num_heads, (q, k, v), rotary, results=1)[0]


def _attend_forward(
    rule: Rule, num_heads: int, q: Array, k: Array, v: Array, rotary: Rotary
) -> tuple[Array, Any]:
    return _attend(rule, num_heads, q, k, v, rotary), (q, k, v, rotary)


def _attend_backward(rule: Rule, num_heads: int, saved: Any, gradient: Array) -> Any:
    *inputs, rotary = saved
    arrays = (*inputs, gradient)
    return *_on_every_device(backward, rule, num_heads, arrays, rotary, results=3), None


_attend.defvjp(_attend_forward, _attend_backward)


def _on_every_device(
    kernel: Callable[..., None],
    rule: Rule,
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
    kernel: Callable[..., None], rule: Rule, *arrays: Array, results: int
) -> tuple[Array, ...]:
    """A kernel for arrays [B, T, D] and tables [T, F]: `results` arrays [B, T, D]."""
    arrays, single_head = arrays[:-3], arrays[-3:]
    batch, length, dim = arrays[0].shape
    lanes = math.lcm(rule.head_dim, LANES)
    lanes = lanes if dim % lanes == 0 else dim
    tables = [jnp.tile(table, (1, lanes // rule.head_dim)) for table in single_head]
    heads = pl.BlockSpec((None, length, lanes), lambda image, group: (image, 0, group))
    everywhere = pl.BlockSpec((length, lanes), lambda image, group: (0, 0))
    pairs = sum(rows.size * keys for rows, keys in chunks(rule, length))
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
        name=f"tpu_attention_{kernel.__name__}",
    )
    return tuple(call(*tables, *arrays))


def _rotary_tables(rotary: Rotary, head_dim: int) -> list[Float[Array, "T F"]]:
    """Factors of a head's features, of those to their right and of those to their left."""
    cos, sin = rotary
    none = jnp.zeros_like(sin)
    parts = ((cos, cos), (-sin, none), (none, sin))
    return [jnp.concatenate(part, axis=-1).astype(jnp.float32) for part in parts]
