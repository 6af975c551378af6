"""Weight-only quantization, for sampling: weights of 8 or 4 bits, and scales.

A quantized weight is a `Quantized` in the parameter tree, which the layers of `linear` accept. With
one scale for each output channel, its product with x is (x @ values) * scale: the compiler converts
the values to the compute type, exactly, where the product reads them, and the scales cost one
multiplication per output. Four bits need a scale for every group of 128 inputs; then the weights
are multiplied by their scales before the product.
"""

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bitdance_jax.nn.stack import stacked_axes


class Format(NamedTuple):
    """How weights are quantized.

    Attributes:
      dtype: of the values.
      largest: magnitude of the value that the largest weight of a group becomes.
      group: inputs that share a scale, or their greatest common divisor with all inputs; None: all.
      pattern: of the paths of the weights that are quantized.
    """

    dtype: Any
    largest: int
    group: int | None
    pattern: re.Pattern[str]


_KERNELS = r"(text/layers|head/groups)(_\d+)?/.*kernel$"
"""Those of the language model's layers and of the head's blocks, 95 % of a released text-to-image
model."""

FORMATS = {
    "int8": Format(jnp.int8, 127, None, re.compile(_KERNELS)),
    "fp8": Format(jnp.float8_e4m3fn, 448, None, re.compile(_KERNELS)),
    # Otherwise the embedding, in bfloat16, would be a sixth of the model.
    "int4": Format(jnp.int4, 8, 128, re.compile(rf"{_KERNELS}|embed_tokens/embedding$")),
}
"""By the name of the type that weights are stored in. What is not quantized is small, or enters
all of a patch's bits: norms, biases, the first and last layers of the head, the embeddings of
times, conditions and bits."""

INT4_SCALES = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Scales that are tried for a group, as parts of the one with which no weight is clipped. The one
with the least squared error is kept: on normal weights it is 11 % smaller than with the first."""


@struct.dataclass
class Quantized:
    """A kernel [C, *F] or an embedding [V, D] with the value `values * scale`.

    Attributes:
      values: int8, float8_e4m3fn or int4, of the weight's shape.
      scale: of the same rank, with one entry for each group along the axis of inputs: [groups, *F]
        or [V, groups]. float32; of int4 bfloat16.
    """

    # Any: JAX's tree functions also put shapes, shardings and other objects there.
    values: Any
    scale: Any

    def dequantized(self, dtype: DTypeLike) -> Array:
        """The weight in the compute type."""
        scale = self.scale.astype(dtype)
        for axis, (size, groups) in enumerate(
            zip(self.values.shape, self.scale.shape, strict=True)
        ):
            if groups not in (1, size):
                scale = jnp.repeat(scale, size // groups, axis)
        return self.values.astype(dtype) * scale


def chosen(path: str, weights: str) -> Format | None:
    """How the weight at a path is quantized if weights are stored in this type; None: it is not."""
    how = FORMATS.get(weights)
    return how if how and how.pattern.search(path) else None


def input_axis(path: str) -> int:
    """The axis of the weight at a path along which products sum; of an embedding, its width."""
    return stacked_axes(tuple(path.split("/"))) + path.endswith("embedding")


def quantize(weight: Float[Array, "..."], how: Format, axis: int = 0) -> Quantized:
    """Rounds a weight to the nearest values.

    Args:
      weight: kernel [C, *F] or embedding [V, D].
      how: one of FORMATS.
      axis: of the inputs, along which weights share scales.
    """
    size = weight.shape[axis]
    group = size if how.group is None else math.gcd(size, how.group)
    groups = weight.astype(jnp.float32).reshape(
        *weight.shape[:axis], size // group, group, *weight.shape[axis + 1 :]
    )
    find = _int4_scale if how.dtype == jnp.int4 else _scale
    scale = find(groups, how, axis + 1)
    values = _rounded(groups, scale, how).reshape(weight.shape)
    return Quantized(values.astype(how.dtype), scale.squeeze(axis + 1))


def abstract(weight: jax.ShapeDtypeStruct, how: Format, path: str) -> Quantized:
    """The shapes and types of the quantized weight at a path."""
    make = functools.partial(quantize, how=how, axis=input_axis(path))
    result: Quantized = jax.eval_shape(make, weight)
    return result


def _scale(groups: Array, how: Format, axis: int) -> Array:
    largest = jnp.max(jnp.abs(groups), axis=axis, keepdims=True)
    return jnp.maximum(largest, jnp.finfo(jnp.float32).tiny) / how.largest


def _int4_scale(groups: Array, how: Format, axis: int) -> Array:
    """int4 has -8 but not 8: the scale has the sign for which the largest weight becomes -8."""
    reduce = functools.partial(jnp.max, axis=axis, keepdims=True)
    positive, negative = reduce(groups), reduce(-groups)
    whole = jnp.where(positive > negative, -positive, negative) / how.largest
    # In the type of the stored scales, so that the values are the nearest ones to these.
    scales = [(part * whole).astype(jnp.bfloat16) for part in INT4_SCALES]
    scales = [jnp.where(scale == 0, 1, scale).astype(jnp.bfloat16) for scale in scales]

    def error(scale: Array) -> Array:
        wrong = _rounded(groups, scale, how) * scale.astype(jnp.float32) - groups
        return jnp.sum(wrong**2, axis=axis, keepdims=True)

    best = jnp.argmin(jnp.stack([error(scale) for scale in scales]), axis=0)
    return jnp.choose(best, scales, mode="clip")


def _rounded(groups: Array, scale: Array, how: Format) -> Array:
    values = groups / scale.astype(jnp.float32)
    if how.dtype == jnp.float8_e4m3fn:
        return jnp.clip(values, -how.largest, how.largest)
    limits = jnp.iinfo(how.dtype)
    return jnp.clip(jnp.round(values), limits.min, limits.max)


def is_int4(params: Any) -> bool:
    """Whether any weight of a tree is quantized to int4."""
    return any(array.dtype == jnp.int4 for array in jax.tree.leaves(params))


def num_bytes(part: Any) -> float:
    """Bytes of an array or of its shape on a device, where two int4 values share a byte."""
    return float(part.size) * (0.5 if part.dtype == jnp.int4 else part.dtype.itemsize)
