"""The reference of the scores: a reference file of ADM's suite, or a folder of real images."""

import os

import numpy as np

from bitdance_jax.errors import FileError, UserError
from bitdance_jax.evaluate.features import Extractor
from bitdance_jax.evaluate.images import ARRAY, FolderImages, Images, NpzImages
from bitdance_jax.evaluate.metrics import FeatureSet, collect
from bitdance_jax.fid.inception import POOLED, SPATIAL
from bitdance_jax.fid.statistics import Gaussian, read_statistics
from bitdance_jax.io import readers
from bitdance_jax.io.paths import local


MAX_STATISTICS_BYTES = 2**27
"""Limit of an array in a reference file; a covariance of 2,048 features has a quarter of it."""

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
"""Arrays of means and covariances in a reference file."""

MANIFOLD_IMAGES = 10_000
"""Images of a folder that make up the reference's manifold, as in ADM's reference files."""


class Reference:
    """A reference. The constructor checks its files and computes no features.

    Args:
      path: an .npz with `mu` and `sigma`, `mu_s` and `sigma_s`, and `arr_0`, from which missing
        statistics are computed, or a folder of images.
      size: of the samples and of the reference's images; those of a folder are centre-cropped.

    Attributes:
      missing: a line for each score that cannot be computed with this file.

    Raises:
      FileError: no such file or folder, neither statistics nor images in it, images of another
        size, or statistics of other features.
    """

    def __init__(self, path: str | os.PathLike[str], size: tuple[int, int]) -> None:
        self._path = os.fspath(path)
        self._pooled: Gaussian | None = None
        self._spatial: Gaussian | None = None
        self._images: Images | None
        if local(path).is_dir():
            self._images = FolderImages(path, size[0] if size[0] == size[1] else None)
        else:
            self._images = self._read_file()
        if self._images is not None and self._images.size != size:
            own, other = (f"{height} x {width}" for height, width in (self._images.size, size))
            raise FileError(
                f"the images of {self._path} are {own}, and the samples {other}; "
                "scores need images of the same size",
                path,
            )
        self.missing: list[str] = []
        if self._images is None:
            self.missing.append(
                f"{self._path} has no {ARRAY}: precision and recall cannot be computed"
            )
            if self._spatial is None:
                self.missing.append(
                    f"{self._path} has no mu_s and sigma_s: sFID cannot be computed"
                )

    def features(self, extractor: Extractor, progress: bool = True) -> FeatureSet:
        """The reference's feature set, with the statistics of the file if it has them."""
        if self._images is None:
            assert self._pooled is not None  # as _read_file checks
            return FeatureSet(self._pooled, self._spatial)
        limit = MANIFOLD_IMAGES if isinstance(self._images, FolderImages) else None
        computed = collect(
            extractor.stream(self._images, "reference", progress), limit, len(self._images)
        )
        return FeatureSet(
            self._pooled or computed.pooled, self._spatial or computed.spatial, computed.vectors
        )

    def _read_file(self) -> Images | None:
        """Reads the statistics of an .npz; returns its images, None if it has none."""
        names, arrays = self._read_arrays()
        self._pooled = read_statistics(self._path, arrays)
        self._spatial = read_statistics(self._path, arrays, "_s")
        for statistics, dimensions in ((self._pooled, POOLED), (self._spatial, SPATIAL)):
            if statistics is not None and len(statistics.mean) != dimensions:
                raise FileError(
                    f"{self._path} has statistics of {len(statistics.mean)} features, and "
                    f"Inception-v3 has {dimensions}; use a reference file of ADM's suite",
                    self._path,
                )
        if ARRAY in names:
            return NpzImages(self._path)
        if self._pooled is None:
            raise FileError(
                f"{self._path} has neither mu and sigma nor {ARRAY}; "
                f"it has: {', '.join(names) or 'nothing'}",
                self._path,
            )
        return None

    def _read_arrays(self) -> tuple[list[str], dict[str, np.ndarray]]:
        """The names of all arrays of an .npz, and the arrays of statistics."""
        try:
            readers.check_file(self._path)
            # numpy would not close a file that is not an .npz.
            with open(self._path, "rb") as opened, np.load(opened) as file:
                names = list(file)
                sizes = {info.filename: info.file_size for info in file.zip.infolist()}
                found = [name for name in names if name in STATISTICS]
                for name in found:
                    if sizes.get(f"{name}.npy", 0) > MAX_STATISTICS_BYTES:
                        raise FileError(
                            f"{name} of {self._path} is too large for statistics; "
                            "fetch the file again",
                            self._path,
                        )
                return names, {name: file[name] for name in found}
        except readers.MissingFile:
            raise FileError(f"no reference file or folder {self._path}", self._path) from None
        except UserError:
            raise
        except Exception as error:  # numpy, zipfile and zlib raise many types of exceptions.
            raise FileError(
                f"{self._path} cannot be read as an .npz ({error}); fetch it again", self._path
            ) from error
