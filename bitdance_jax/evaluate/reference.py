"""What samples are compared with: a reference file of ADM's suite, or a folder of real images."""

import os
from pathlib import Path

import numpy as np

from bitdance_jax.errors import UserError
from bitdance_jax.evaluate.features import Extractor
from bitdance_jax.evaluate.images import ARRAY, FolderImages, Images, NpzImages
from bitdance_jax.evaluate.inception import POOLED, SPATIAL
from bitdance_jax.evaluate.metrics import FeatureSet, collect
from bitdance_jax.evaluate.statistics import Gaussian, read_statistics
from bitdance_jax.io import readers


MAX_STATISTICS_BYTES = 2**27
"""Of an array in a reference file: a covariance of 2,048 features in float64 has a quarter."""

MANIFOLD_IMAGES = 10_000
"""Images of a folder that the reference's manifold is made of: as many as ADM's reference files hold."""


class Reference:
    """A reference, opened and checked, before any features are computed.

    Args:
      path: an .npz with `mu` and `sigma`, `mu_s` and `sigma_s`, `arr_0` (statistics that are not there are computed from arr_0), or a
        folder of images, from which all is computed.
      size: of the samples; the images must have it, and those of a folder are centre-cropped to it.

    Attributes:
      missing: a line for each score that the file does not allow.

    Raises:
      UserError: no such file or folder, neither statistics nor images, images of another size, statistics of other features.
    """

    def __init__(self, path: str | os.PathLike[str], size: tuple[int, int]) -> None:
        self._path = os.fspath(path)
        self._pooled: Gaussian | None = None
        self._spatial: Gaussian | None = None
        self._images: Images | None
        if Path(path).is_dir():
            self._images = FolderImages(path, size[0] if size[0] == size[1] else None)
        else:
            self._images = self._read_file()
        if self._images is not None and self._images.size != size:
            there, here = (f"{height} x {width}" for height, width in (self._images.size, size))
            raise UserError(
                f"the samples are {here} and the images of {self._path} {there}; scores need one size"
            )
        self.missing = (
            []
            if self._images
            else [f"{self._path} has no {ARRAY}: precision and recall cannot be computed"]
        )
        if self._images is None and self._spatial is None:
            self.missing.append(f"{self._path} has no mu_s and sigma_s: sFID cannot be computed")

    def features(self, extractor: Extractor, progress: bool = True) -> FeatureSet:
        """The reference's feature set: from its images, with the statistics of the file where it has them."""
        if self._images is None:
            assert self._pooled is not None  # checked when the file was read
            return FeatureSet(self._pooled, self._spatial)
        limit = MANIFOLD_IMAGES if isinstance(self._images, FolderImages) else None
        computed = collect(
            extractor.stream(self._images, "reference", progress), limit, len(self._images)
        )
        return FeatureSet(
            self._pooled or computed.pooled, self._spatial or computed.spatial, computed.vectors
        )

    def _read_file(self) -> Images | None:
        try:
            readers.check_file(self._path)
            # numpy leaves a file open that is no .npz.
            with open(self._path, "rb") as opened, np.load(opened) as file:
                names = list(file)
                wanted = [name for name in names if name in ("mu", "sigma", "mu_s", "sigma_s")]
                sizes = {info.filename: info.file_size for info in file.zip.infolist()}
                if large := [
                    name for name in wanted if sizes.get(f"{name}.npy", 0) > MAX_STATISTICS_BYTES
                ]:
                    raise UserError(
                        f"{large[0]} of {self._path} is larger than such statistics are; fetch the file again"
                    )
                arrays = {name: file[name] for name in wanted}
        except readers.MissingFile:
            raise UserError(f"no reference file or folder {self._path}") from None
        except UserError:
            raise
        except (
            Exception
        ) as error:  # numpy, zipfile and zlib raise many types for a file that they cannot read
            raise UserError(
                f"{self._path} cannot be read as an .npz ({error}); fetch it again"
            ) from error
        self._pooled = read_statistics(self._path, arrays)
        self._spatial = read_statistics(self._path, arrays, "_s")
        for statistics, dimensions in ((self._pooled, POOLED), (self._spatial, SPATIAL)):
            if statistics is not None and len(statistics.mean) != dimensions:
                raise UserError(
                    f"{self._path} has statistics of {len(statistics.mean)} features, and Inception-v3 gives {dimensions}"
                )
        if ARRAY in names:
            return NpzImages(self._path)
        if self._pooled is None:
            raise UserError(
                f"{self._path} has neither mu and sigma nor {ARRAY}; it has: {', '.join(names) or 'nothing'}"
            )
        return None
