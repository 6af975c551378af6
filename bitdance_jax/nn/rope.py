"""Rotary position embeddings, in rotate-half form: dimension i of a head is paired with dimension i + D/2.

The release's class-conditional models pair neighbouring dimensions instead; conversion reorders their query and key weights once
(`convert.keys`), which leaves every product of a query with a key as it was, and spares accelerators the strided shuffles.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rotary_angles_2d(xy: np.ndarray, head_dim: int, base: float) -> np.ndarray:
    """Angles [T, head_dim / 2] of 2-D positions [T, 2] (x, y): the first half of the frequencies turns with x, the second with y."""
    frequencies = base ** -(np.arange(0, head_dim // 2, 2, dtype=np.float32) / (head_dim // 2))
    return np.concatenate([xy[:, :1] * frequencies, xy[:, 1:] * frequencies], axis=-1).astype(
        np.float32
    )


def frequencies_1d(head_dim: int, base: float) -> np.ndarray:
    """base^(-2i / head_dim), float32 [head_dim / 2]."""
    return (base ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)


def rotary_1d(
    positions: Int[Array, "*B T"], head_dim: int, base: float
) -> tuple[Float[Array, "*B T half"], Float[Array, "*B T half"]]:
    """Cosines and sines of positions in a text; half = head_dim / 2."""
    angles = positions[..., None].astype(jnp.float32) * frequencies_1d(head_dim, base)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B N T D"], cos: Float[Array, "*#B T half"], sin: Float[Array, "*#B T half"]
) -> Float[Array, "B N T D"]:
    """Turn every head's pairs (i, i + D/2) by the angles of its token; computed in float32, returned in x's dtype.

    The tables are the same for all rows, or have a row each.
    """
    cos, sin = cos[..., None, :, :], sin[..., None, :, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
