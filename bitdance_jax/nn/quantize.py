"""Weight-only int8 with one scale for each output channel.

It takes half the memory of bfloat16, and half the time to read. A quantized kernel is an
`Int8Kernel` in the parameter tree, which the layers of `linear` accept. Its product with x is (x @
int8) * scale: the compiler converts int8 to the compute type, exactly, where the product reads it,
and the scales cost one multiplication per output.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float


QUANTIZED = re.compile(r"(text/layers|head/groups)(_\d+)?/.*kernel$")
"""Paths of the kernels that are quantized: those of the language model's layers and of the head's
blocks, 95 % of a released text-to-image model."""


@struct.dataclass
class Int8Kernel:
    """A kernel [C, *F] with the value `int8 * scale`.

    Attributes:
      int8: int8 [C, *F], in -127 ... 127.
      scale: float32 [1, *F].
    """

    # Any: JAX's tree functions also put shapes, shardings and other objects there.
    int8: Any
    scale: Any


@jax.jit
def quantize(kernel: Float[Array, "C *F"]) -> Int8Kernel:
    """Rounds to the nearest of 255 steps; the largest weight of an output channel is +-127."""
    weights = kernel.astype(jnp.float32)
    scale = (
        jnp.maximum(jnp.max(jnp.abs(weights), axis=0, keepdims=True), jnp.finfo(jnp.float32).tiny)
        / 127
    )
    return Int8Kernel(jnp.round(weights / scale).astype(jnp.int8), scale)
