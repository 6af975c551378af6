"""Improved precision and recall (arXiv 1904.06991), as in ADM's suite."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Bool, Float
from tqdm import tqdm

from bitdance_jax.errors import UserError


NEIGHBOURS = 3
BLOCK = 10_000
"""Side of a block of distances. A block in float32 is 0.4 GB, and a few fit a device of 16 GB."""


def precision_recall(
    reference: Float[np.ndarray, "B D"],
    samples: Float[np.ndarray, "samples D"],
    *,
    neighbours: int = NEIGHBOURS,
    block: int = BLOCK,
    progress: bool = False,
) -> tuple[float, float]:
    """The share of samples in the reference's manifold, and of the reference in the samples'.

    A manifold is the union of balls around the features. The radius of a ball is the distance of
    its feature to the k-th nearest other feature. Distances are in float32; ADM's suite rounds them
    to float16, which changed both shares of synthetic features by 0.002 to 0.003.

    Args:
      reference: features of real images.
      samples: features of generated ones.
      neighbours: k; 3 in ADM's suite.
      block: side of a block of distances; the result does not depend on it.
      progress: show a progress bar.

    Raises:
      UserError: too few features, or features that are not finite.
    """
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) <= neighbours:
            raise UserError(
                f"precision and recall need more than {neighbours} images in the {name}, "
                f"got {len(features)}"
            )
        if not np.isfinite(features).all():
            raise UserError(
                f"the features of the {name} are not finite; check the feature network's weights"
            )
    rows, columns = (-(-len(features) // block) for features in (reference, samples))
    with tqdm(
        total=rows**2 + columns**2 + rows * columns,
        unit="block",
        desc="manifolds",
        disable=not progress,
        dynamic_ncols=True,
    ) as bar:
        reference_radii = _radii(reference, neighbours, block, bar)
        sample_radii = _radii(samples, neighbours, block, bar)
        covered = np.zeros(len(reference), bool)
        realistic = np.zeros(len(samples), bool)
        for i in _blocks(len(reference), block):
            for j in _blocks(len(samples), block):
                rows_inside, columns_inside = _inside(
                    reference[i], reference_radii[i], samples[j], sample_radii[j]
                )
                covered[i] |= np.asarray(rows_inside)
                realistic[j] |= np.asarray(columns_inside)
                bar.update()
    return float(realistic.mean()), float(covered.mean())


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _radii(features: np.ndarray, neighbours: int, block: int, bar: tqdm) -> np.ndarray:
    """Squared distance of each feature to its k-th neighbour, not counting the feature itself."""
    radii = []
    for i in _blocks(len(features), block):
        nearest = jnp.full((len(features[i]), neighbours + 1), jnp.inf)
        for j in _blocks(len(features), block):
            nearest = _nearest(features[i], features[j], nearest)
            bar.update()
        radii.append(np.asarray(nearest).max(axis=1))
    return np.concatenate(radii)


@jax.jit
def _nearest(
    rows: Float[Array, "B D"], columns: Float[Array, "columns D"], nearest: Float[Array, "B k"]
) -> Float[Array, "B k"]:
    """The k smallest of the squared distances to `columns` and of those in `nearest`."""
    candidates = jnp.concatenate([nearest, _squared_distances(rows, columns)], axis=1)
    return -jax.lax.top_k(-candidates, nearest.shape[1])[0]


@jax.jit
def _inside(
    rows: Float[Array, "B D"],
    row_radii: Float[Array, "B"],
    columns: Float[Array, "columns D"],
    column_radii: Float[Array, "columns"],
) -> tuple[Bool[Array, "B"], Bool[Array, "columns"]]:
    """Which rows are in the ball around any column, and which columns in that around any row."""
    distances = _squared_distances(rows, columns)
    rows_inside = jnp.any(distances <= column_radii, axis=1)
    columns_inside = jnp.any(distances <= row_radii[:, None], axis=0)
    return rows_inside, columns_inside


def _squared_distances(
    rows: Float[Array, "B D"], columns: Float[Array, "columns D"]
) -> Float[Array, "B columns"]:
    products = jnp.matmul(rows, columns.T, precision=Precision.HIGHEST)
    row_squares = jnp.sum(rows**2, axis=1)[:, None]
    return jnp.maximum(row_squares - 2 * products + jnp.sum(columns**2, axis=1), 0)
