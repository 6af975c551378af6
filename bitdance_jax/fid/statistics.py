"""Mean and covariance of features, computed batch by batch or read from a reference file."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bitdance_jax.errors import FileError, UserError


@dataclass(frozen=True)
class Gaussian:
    """Mean and unbiased covariance of features, in float64.

    Attributes:
      mean: [D].
      covariance: [D, D].
      count: number of images; None if it was read from a file.
    """

    mean: Float[np.ndarray, "D"]
    covariance: Float[np.ndarray, "D D"]
    count: int | None = None


class RunningGaussian:
    """Computes a `Gaussian` batch by batch in float64, without storing the features.

    Chan's formula merges the batches without cancellation.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: np.ndarray | None = None
        self._scatter: np.ndarray | None = None

    def add(self, features: Float[np.ndarray, "B D"]) -> None:
        """Adds a batch.

        Raises:
          UserError: features that are NaN or infinite.
        """
        finite = np.isfinite(features).all(axis=1)
        if not finite.all():
            first = self.count + int(np.argmin(finite))
            raise UserError(
                f"the features of image {first} are not finite; check the feature network's weights"
            )
        if not len(features):
            return
        batch = features.astype(np.float64)
        mean = batch.mean(axis=0)
        centred = batch - mean
        scatter = centred.T @ centred
        if self._mean is None or self._scatter is None:
            self.count = len(batch)
            self._mean = mean
            self._scatter = scatter
            return
        total = self.count + len(batch)
        shift = mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(shift, shift * (self.count * len(batch) / total))
        self._mean += shift * (len(batch) / total)
        self.count = total

    def result(self) -> Gaussian:
        """The Gaussian of all features so far.

        Raises:
          UserError: fewer than two images.
        """
        if self._mean is None or self._scatter is None or self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.count}")
        return Gaussian(self._mean.copy(), self._scatter / (self.count - 1), self.count)


def gaussian(features: Float[np.ndarray, "B D"]) -> Gaussian:
    """Mean and covariance of features."""
    running = RunningGaussian()
    running.add(features)
    return running.result()


def read_statistics(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], suffix: str = ""
) -> Gaussian | None:
    """`mu` and `sigma` of a reference file; None if it has neither.

    Args:
      path: of the file, for messages.
      arrays: of the file.
      suffix: "_s" for the statistics of the spatial features.

    Raises:
      FileError: only one of the two, shapes that do not match, or values that are not finite.
    """
    names = [f"mu{suffix}", f"sigma{suffix}"]
    missing = [name for name in names if name not in arrays]
    if len(missing) == 2:
        return None
    if missing:
        raise FileError(f"{os.fspath(path)} has no array {missing[0]}, which is needed", path)
    mean, covariance = (np.asarray(arrays[name]) for name in names)
    where = f"{os.fspath(path)}: {names[0]} and {names[1]}"
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise FileError(
            f"{where} must have shapes [D] and [D, D], got {mean.shape} and {covariance.shape}",
            path,
        )
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise FileError(
            f"{where} must be floating point, got {mean.dtype} and {covariance.dtype}", path
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise FileError(f"{where} must be finite; fetch the file again", path)
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))
