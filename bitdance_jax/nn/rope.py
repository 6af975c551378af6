"""Rotary position embeddings, in rotate-half form: dimension i of a head is paired with i + F/2.

The release's class-conditional models pair neighbouring dimensions instead. Conversion reorders
their query and key weights once (`convert.keys`): the products of queries with keys stay the same,
and accelerators need no strided shuffles.
"""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def rotary_angles_2d(xy: np.ndarray, head_dim: int, base: float) -> np.ndarray:
    """Angles [T, head_dim / 2] of positions [T, 2] (x, y).

    The first half of the frequencies is for x, the second for y.
    """
    frequencies = base ** -(np.arange(0, head_dim // 2, 2, dtype=np.float32) / (head_dim // 2))
    return np.concatenate([xy[:, :1] * frequencies, xy[:, 1:] * frequencies], axis=-1).astype(
        np.float32
    )


def frequencies_1d(head_dim: int, base: float) -> np.ndarray:
    """base^(-2i / head_dim), float32 [head_dim / 2]."""
    return (base ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)


def rotary_1d(
    positions: Int[Array, "*B T"],
    head_dim: int,
    base: float,
    frequency_dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "*B T half"], Float[Array, "*B T half"]]:
    """Cosines and sines of positions in a text; half = head_dim / 2. The frequencies are rounded to
    `frequency_dtype`; all else is float32."""
    frequencies = frequencies_1d(head_dim, base).astype(frequency_dtype).astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B A T F"], cos: Float[Array, "*#B T half"], sin: Float[Array, "*#B T half"]
) -> Float[Array, "B A T F"]:
    """Rotates the pairs (i, i + F/2) of every head by the angles of its token.

    Computed in float32, returned in x's dtype. `cos` and `sin` are the same in all rows, or differ.
    """
    cos = cos[..., None, :, :]
    sin = sin[..., None, :, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
