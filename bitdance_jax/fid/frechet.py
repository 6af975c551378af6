"""Fréchet distance between Gaussians.

FID compares pooled Inception features (arXiv 1706.08500), sFID spatial ones (arXiv 2103.03841).
"""

import numpy as np

from bitdance_jax.errors import UserError
from bitdance_jax.fid.statistics import Gaussian


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|² + tr(A + B - 2 (A B)^½), in float64.

    The last trace is computed from A^½ B A^½, which has the eigenvalues of A B and is symmetric: so
    singular covariances need no offset on the diagonal, and there is no imaginary part.

    Raises:
      UserError: different numbers of dimensions.
    """
    if len(a.mean) != len(b.mean):
        raise UserError(
            f"cannot compare features of {len(a.mean)} and {len(b.mean)} dimensions; "
            "use the same feature network for both"
        )
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)).sum()
    shift = a.mean - b.mean
    distance = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return max(0.0, float(distance))  # Rounding can make that of equal Gaussians negative.
