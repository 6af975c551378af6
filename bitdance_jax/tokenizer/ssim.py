"""Structural similarity (Wang et al., 2004), with the Gaussian window of the paper."""

import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Float, UInt8

from bitdance_jax.errors import UserError


SIGMA = 1.5
RADIUS = 5
C1 = (0.01 * 255) ** 2
C2 = (0.03 * 255) ** 2


def ssim(
    images: UInt8[Array | np.ndarray, "B H W C"], references: UInt8[Array | np.ndarray, "B H W C"]
) -> Float[Array, "B"]:
    """SSIM of each image: peak 255, mean over channels and 11 x 11 windows inside the image.

    Raises:
      UserError: images smaller than the window.
    """
    _, height, width, _ = images.shape
    if min(height, width) <= 2 * RADIUS:
        raise UserError(
            f"SSIM needs images of at least {2 * RADIUS + 1} pixels a side, got {height} x {width}"
        )
    rows = _window(height)
    columns = _window(width)

    def smooth(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        return jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns, precision=Precision.HIGHEST)

    # A constant offset does not change the variances and makes their rounding errors smaller.
    x = jnp.asarray(images, jnp.float32) - 128
    y = jnp.asarray(references, jnp.float32) - 128
    mean_x = smooth(x)
    mean_y = smooth(y)
    variance_x = smooth(x * x) - mean_x**2
    variance_y = smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    mean_x = mean_x + 128
    mean_y = mean_y + 128
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def _window(length: int) -> Float[np.ndarray, "windows length"]:
    """The matrix of the smoothing: row i has the weights of the window that starts at pixel i."""
    weights = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
    windows = length - 2 * RADIUS
    matrix = np.zeros((windows, length), np.float32)
    for i in range(windows):
        matrix[i, i : i + len(weights)] = weights / weights.sum()
    return matrix
