"""Weight-only int8, one scale for each output channel: half the memory of bfloat16, and half the time to read it.

A quantized kernel is a small tree in the place of the array, which `linear` reads. Its product with x is (x @ int8) * scale: the compiler
converts int8 to the compute type (exactly) where the product reads it, and the scales cost one multiplication an output.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float


QUANTIZED = re.compile(r"(text/layers|head/groups)(_\d+)?/.*kernel$")
"""Paths of the kernels, 95 % of a released text-to-image model, that are worth it: of the language model's layers and the head's blocks."""


@struct.dataclass
class Int8Kernel:
    """A kernel [C, *features] of which `int8 * scale` is the value.

    Attributes:
      int8: int8 [C, *features], in -127 ... 127.
      scale: float32 [1, *features].
    """

    # Not only arrays: JAX puts shapes, places and others there.
    int8: Any
    scale: Any


@jax.jit
def quantize(kernel: Float[Array, "C *F"]) -> Int8Kernel:
    """To the nearest of 255 steps, the largest weight of an output channel being the last of them."""
    weights = kernel.astype(jnp.float32)
    scale = (
        jnp.maximum(jnp.max(jnp.abs(weights), axis=0, keepdims=True), jnp.finfo(jnp.float32).tiny)
        / 127
    )
    return Int8Kernel(jnp.round(weights / scale).astype(jnp.int8), scale)
