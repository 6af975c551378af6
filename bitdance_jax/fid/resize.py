"""Bilinear resizing as in TensorFlow 1 (`resize_bilinear` with align_corners=False)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped


def resize_bilinear(
    images: Shaped[Array | np.ndarray, "B H W C"], size: tuple[int, int]
) -> Float[Array, "B h w C"]:
    """Resized images in float32, in the range of the given ones.

    Output pixel i is at position i * (input / output) of the input: corners, not centres, coincide,
    and there is no antialiasing. Later libraries differ, which changes FID (arXiv 2104.11222).
    """
    x = jnp.asarray(images, jnp.float32)
    for axis, length in ((2, size[1]), (1, size[0])):
        low, high, fraction = _sources(x.shape[axis], length)
        start = jnp.take(x, low, axis)
        end = jnp.take(x, high, axis)
        x = start + (end - start) * fraction.reshape([-1] + [1] * (3 - axis))
    return x


def _sources(before: int, after: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two input pixels of each output pixel, and the weight of the second, all in float32."""
    position = np.arange(after, dtype=np.float32) * (np.float32(before) / np.float32(after))
    low = position.astype(np.int32)
    return low, np.minimum(low + 1, before - 1), position - low.astype(np.float32)
