"""Mean and covariance of features: accumulated batch by batch, or read from a reference file of ADM's suite."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bitdance_jax.errors import UserError


@dataclass(frozen=True)
class Gaussian:
    """The normal distribution that Fréchet distances compare, in float64.

    Attributes:
      mean: [D].
      covariance: [D, D], unbiased.
      count: features it was estimated from; None where a file does not say.
    """

    mean: Float[np.ndarray, "D"]
    covariance: Float[np.ndarray, "D D"]
    count: int | None = None


class RunningGaussian:
    """Accumulates a `Gaussian` in float64 without keeping the features: batches are merged by Chan's formula, which loses no digits."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: np.ndarray | None = None
        self._scatter: np.ndarray | None = None

    def add(self, features: Float[np.ndarray, "B D"]) -> None:
        """Takes in one batch.

        Raises:
          UserError: NaN or infinite features.
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
            self.count, self._mean, self._scatter = len(batch), mean, scatter
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
          UserError: fewer than two.
        """
        if self._mean is None or self._scatter is None or self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.count}")
        return Gaussian(self._mean.copy(), self._scatter / (self.count - 1), self.count)


def gaussian(features: Float[np.ndarray, "N D"]) -> Gaussian:
    """Mean and covariance of features."""
    running = RunningGaussian()
    running.add(features)
    return running.result()


def read_statistics(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], suffix: str = ""
) -> Gaussian | None:
    """`mu` and `sigma` of a reference file's arrays (with suffix "_s" those of the spatial features), or None where it has neither.

    Raises:
      UserError: one without the other, shapes that do not belong together, values that are not finite.
    """
    names = [f"mu{suffix}", f"sigma{suffix}"]
    missing = [name for name in names if name not in arrays]
    if len(missing) == 2:
        return None
    if missing:
        raise UserError(
            f"{os.fspath(path)} has no array {missing[0]}; mu and sigma belong together"
        )
    mean, covariance = (np.asarray(arrays[name]) for name in names)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"{os.fspath(path)}: {names[0]} {mean.shape} and {names[1]} {covariance.shape} must be [D] and [D, D]"
        )
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise UserError(
            f"{os.fspath(path)}: {names[0]} and {names[1]} must be floating point, got {mean.dtype} and {covariance.dtype}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(
            f"{os.fspath(path)}: {names[0]} or {names[1]} has values that are not finite"
        )
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))
