"""Flax's linear layers and embeddings, which gather their sharded weights before they use them.

Without that, if a product sums over an axis of a kernel that is sharded over "fsdp", the compiler
shards the activations in the same way, or turns the product into a ring of small ones. Both cost
TPUs several times the product (`bitdance plan` shows it). The kernels of Dense and DenseGeneral and
the table of Embed may be `quantize.Quantized`; kernels may have adapters beside them
(`nn.lora.attached`).

The gradient of a weight is a product that sums over rows, on each device and then over the devices
that have other rows. JAX computes it in the type of the forward product; within
`gradient_sums(jnp.float32)` the layers sum it in float32.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array

from bitdance_jax.distributed.constraints import gathered
from bitdance_jax.nn import lora
from bitdance_jax.nn.quantize import Quantized


gradient_sums: Any = jax.make_user_context(default_value=None)
"""A context: the type in which gradients of kernels and biases are summed; None: the compute type.
Forward mode is not supported in it."""


class _Gathered:
    def param(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        array = super().param(name, *arguments, **keywords)  # type: ignore[misc]
        if name not in ("kernel", "embedding"):
            return array
        path = "/".join((*self.path, name))  # type: ignore[attr-defined]
        if isinstance(array, Quantized):
            shape = array.values.shape
            return jax.tree.map(lambda part: gathered(part, path, part.dtype, of=shape), array)
        sums = gradient_sums.value if name == "kernel" else None
        return gathered(array, path, self.dtype or array.dtype, sums=sums)  # type: ignore[attr-defined]


class _Linear(_Gathered):
    def __call__(self, inputs: Array) -> Array:
        y = super().__call__(inputs).astype(self.dtype)  # type: ignore[misc, attr-defined]
        if not self.has_variable("params", lora.A):  # type: ignore[attr-defined]
            return y
        low_rank = inputs.astype(self.dtype)  # type: ignore[attr-defined]
        for name in (lora.A, lora.B):
            weights = self.get_variable("params", name)  # type: ignore[attr-defined]
            path = "/".join((*self.path, name))  # type: ignore[attr-defined]
            weights = gathered(weights, path, self.dtype, sums=gradient_sums.value)  # type: ignore[attr-defined]
            low_rank = _product(low_rank, weights, (((low_rank.ndim - 1,), (0,)), ((), ())))
        return y + low_rank


def gathered_kernel(layer: nn.Dense) -> Array:
    """The kernel of a bound Dense layer, gathered once for several products."""
    path = "/".join((*layer.path, "kernel"))
    kernel: Array = layer.get_variable("params", "kernel")
    return gathered(kernel, path, layer.dtype or kernel.dtype, sums=gradient_sums.value)


def product(inputs: Array, kernel: Array) -> Array:
    """The product of a Dense layer with its `gathered_kernel`, over the last axis of the inputs."""
    return _product(inputs, kernel, (((inputs.ndim - 1,), (0,)), ((), ())))


def _promote(
    inputs: Array, kernel: Array | Quantized, bias: Array | None, *, dtype: Any
) -> tuple[Any, Any, Any]:
    if gradient_sums.value is not None:
        # A bias that is added in the sums' type has its gradient summed in it.
        return inputs.astype(dtype), kernel, bias
    if not isinstance(kernel, Quantized):
        return tuple(promote_dtype(inputs, kernel, bias, dtype=dtype))
    inputs, bias = promote_dtype(inputs, bias, dtype=dtype)
    return inputs, kernel, bias


def _product(
    inputs: Array, kernel: Array | Quantized, dimensions: Any, precision: Any = None
) -> Array:
    if not isinstance(kernel, Quantized):
        product = functools.partial(
            jax.lax.dot_general, dimension_numbers=dimensions, precision=precision
        )
        return _apply(product, functools.partial(_dot_gradient, dtype=kernel.dtype), inputs, kernel)
    # Without the barrier the compiler could convert the weights of all layers before the first one
    # runs.
    inputs, quantized = jax.lax.optimization_barrier((inputs, kernel))
    if len(quantized.scale) > 1:
        weights = quantized.dequantized(inputs.dtype)
        return jax.lax.dot_general(inputs, weights, dimensions, precision)
    # In the compute type, in which devices exchange their parts of the sum.
    weights = quantized.values.astype(inputs.dtype)
    y = jax.lax.dot_general(inputs, weights, dimensions, precision)
    return (y * quantized.scale[0]).astype(inputs.dtype)


def _convolution(
    inputs: Array, kernel: Array, strides: Any, padding: Any, **keywords: Any
) -> Array:
    size = kernel.shape[:2]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(inputs.shape[1:3], size, strides, padding)
    product = functools.partial(
        jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **keywords
    )
    gradient = functools.partial(
        _convolution_gradient, size=size, strides=strides, padding=padding, dtype=kernel.dtype
    )
    return _apply(product, gradient, inputs, kernel)


_Product = Callable[[Array, Array], Array]


def _apply(product: _Product, gradient: _Product, inputs: Array, kernel: Array) -> Array:
    """A product with a kernel of the same type or a wider one, in which its gradient is summed.

    Args:
      product: of inputs and kernel.
      gradient: of the kernel, a function of inputs and the gradient of the product.
      inputs, kernel: of `product`.
    """
    return (
        product(inputs, kernel)
        if inputs.dtype == kernel.dtype
        else _summed_widely(product, gradient, inputs, kernel)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed_widely(product: _Product, gradient: _Product, inputs: Array, kernel: Array) -> Array:
    return product(inputs, kernel.astype(inputs.dtype))


def _forward(
    product: _Product, gradient: _Product, inputs: Array, kernel: Array
) -> tuple[Array, tuple[Array, Array]]:
    weights = kernel.astype(inputs.dtype)
    return product(inputs, weights), (inputs, weights)


def _backward(
    product: _Product, gradient: _Product, saved: tuple[Array, Array], y: Array
) -> tuple[Array, Array]:
    inputs, weights = saved
    _, pull = jax.vjp(lambda inputs: product(inputs, weights), inputs)
    return pull(y)[0], gradient(inputs, y)


_summed_widely.defvjp(_forward, _backward)


def _dot_gradient(inputs: Array, y: Array, dtype: Any) -> Array:
    """The gradient of the kernel [C, ...] of a product over the last axis of the inputs."""
    rows = tuple(range(inputs.ndim - 1))
    product = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=((rows, rows), ((), ())),
        preferred_element_type=dtype,
    )
    return _wider(product, inputs, y, dtype)


def _convolution_gradient(
    inputs: Array,
    y: Array,
    *,
    size: tuple[int, ...],
    strides: tuple[int, ...],
    padding: Sequence[tuple[int, int]],
    dtype: Any,
) -> Array:
    """The gradient of the kernel [h, w, in, out] of a convolution: one of the inputs with `y`."""
    pads = []
    for k, stride, (low, _), length, count in zip(
        size, strides, padding, inputs.shape[1:3], y.shape[1:3], strict=True
    ):
        pads.append((low, k + (count - 1) * stride - length - low))
    product = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding=pads,
        rhs_dilation=strides,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=dtype,
    )
    return _wider(product, inputs, y, dtype)


def _wider(product: _Product, inputs: Array, y: Array, dtype: Any) -> Array:
    """A product in a type wider than its inputs, some of which the compiler for CPUs lacks."""
    return jax.lax.platform_dependent(
        inputs,
        y,
        cpu=lambda inputs, y: product(inputs.astype(dtype), y.astype(dtype)),
        default=product,
    )


class Dense(_Linear, nn.Dense):
    """flax.linen.Dense."""

    promote_dtype: Any = _promote
    dot_general: Any = _product


class DenseGeneral(_Linear, nn.DenseGeneral):
    """flax.linen.DenseGeneral."""

    promote_dtype: Any = _promote
    dot_general: Any = _product


class Conv(_Linear, nn.Conv):
    """flax.linen.Conv."""

    promote_dtype: Any = _promote
    conv_general_dilated: Any = _convolution


class Embed(_Gathered, nn.Embed):
    """flax.linen.Embed."""

    def __call__(self, inputs: Array) -> Array:
        table = self.embedding
        if not isinstance(table, Quantized):
            return super().__call__(inputs)
        rows = jax.tree.map(lambda part: jnp.take(part, inputs, axis=0), table)
        return rows.dequantized(self.dtype or jnp.float32)
