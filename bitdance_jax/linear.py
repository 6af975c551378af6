"""Flax's linear layers and embeddings, whose weights are gathered where they are used (`sharding.gathered`).

Left to the compiler, a kernel that is cut over "fsdp" along the axis that a product sums over makes it cut the activations likewise, or
turn each product into a ring of small ones; both cost TPUs several times the product (`python -m bitdance_jax.plan`).
The kernels of Dense and DenseGeneral may be `quantize.Int8Kernel`.
"""

from typing import Any

import flax.linen as nn
import jax
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array

from bitdance_jax import sharding
from bitdance_jax.quantize import Int8Kernel


class _Gathered:
    def param(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        array = super().param(name, *arguments, **keywords)  # type: ignore[misc]
        if name not in ("kernel", "embedding"):
            return array
        path = "/".join((*self.path, name))  # type: ignore[attr-defined]
        if isinstance(array, Int8Kernel):
            return jax.tree.map(lambda part: sharding.gathered(part, path, part.dtype), array)
        return sharding.gathered(array, path, self.dtype or array.dtype)  # type: ignore[attr-defined]


def _promote(inputs: Array, kernel: Array | Int8Kernel, bias: Array | None, *, dtype: Any) -> tuple[Any, Any, Any]:
    if not isinstance(kernel, Int8Kernel):
        return tuple(promote_dtype(inputs, kernel, bias, dtype=dtype))
    inputs, bias = promote_dtype(inputs, bias, dtype=dtype)
    return inputs, kernel, bias


def _product(inputs: Array, kernel: Array | Int8Kernel, dimensions: Any, precision: Any = None) -> Array:
    if not isinstance(kernel, Int8Kernel):
        return jax.lax.dot_general(inputs, kernel, dimensions, precision)
    # The barrier keeps the compiler from converting weights before they are needed, all of a model's at once.
    inputs, weights = jax.lax.optimization_barrier((inputs, kernel.int8))
    # In the compute type, in which devices that each hold a part of the sum exchange it.
    y = jax.lax.dot_general(inputs, weights.astype(inputs.dtype), dimensions, precision)
    return (y * kernel.scale[0]).astype(inputs.dtype)


class Dense(_Gathered, nn.Dense):
    """flax.linen.Dense."""

    promote_dtype: Any = _promote
    dot_general: Any = _product


class DenseGeneral(_Gathered, nn.DenseGeneral):
    """flax.linen.DenseGeneral."""

    promote_dtype: Any = _promote
    dot_general: Any = _product


class Conv(_Gathered, nn.Conv):
    """flax.linen.Conv."""


class Embed(_Gathered, nn.Embed):
    """flax.linen.Embed."""
