"""Structural similarity (Wang et al., 2004), with the Gaussian window of the paper."""

import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Float, UInt8

from bitdance_jax.errors import UserError


SIGMA, RADIUS = 1.5, 5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def ssim(
    images: UInt8[Array | np.ndarray, "B H W C"], references: UInt8[Array | np.ndarray, "B H W C"]
) -> Float[Array, "B"]:
    """SSIM of each image: peak 255, 11 x 11 window, mean over channels and over the windows that lie inside the image.

    Raises:
      UserError: images smaller than the window.
    """
    _, height, width, _ = images.shape
    if min(height, width) <= 2 * RADIUS:
        raise UserError(
            f"SSIM needs images of at least {2 * RADIUS + 1} pixels a side, got {height} x {width}"
        )
    rows, columns = _window(height), _window(width)

    def smooth(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        return jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns, precision=Precision.HIGHEST)

    # Variances do not change with the zero, and lose fewer digits around it; means need it back.
    x, y = (jnp.asarray(image, jnp.float32) - 128 for image in (images, references))
    mean_x, mean_y = smooth(x), smooth(y)
    variance_x, variance_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + 128, mean_y + 128
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def _window(length: int) -> Float[np.ndarray, "inside length"]:
    """Row i holds the weights of the window that starts at pixel i: smoothing is a product with this matrix."""
    weights = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
    inside = length - 2 * RADIUS
    matrix = np.zeros((inside, length), np.float32)
    for i in range(inside):
        matrix[i, i : i + len(weights)] = weights / weights.sum()
    return matrix
