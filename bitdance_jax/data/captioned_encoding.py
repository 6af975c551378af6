"""Captioned images encoded one after the other, while the next ones are loaded."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from bitdance_jax.data.buckets import Buckets, TooSmall
from bitdance_jax.data.captioned import CaptionedImage, CaptionedSource, Images, Tokens
from bitdance_jax.data.mixture import fitted
from bitdance_jax.data.packed_batches import Encode, SampleReader
from bitdance_jax.data.records import Skipped
from bitdance_jax.io.image_files import DamagedImage


WINDOW_BYTES = 2**28
"""Size of the images that are encoded together, and of those that are loaded meanwhile."""

MAX_WINDOW = 256
"""The most images that are encoded together."""


def encoded_images(
    images: Images,
    indices: Sequence[int],
    encode: Encode,
    *,
    resolutions: Sequence[int],
    size_multiple: int,
    too_small: TooSmall = "upscale",
    workers: int = 0,
    instead: str = "its record says so",
) -> Iterator[CaptionedImage | DamagedImage]:
    """Images as tokens: records with `versions`, in the order of `indices`.

    In place of an image that cannot be read, the error about it, which is also named on stderr.

    Args:
      images: with pixels.
      indices: which of them.
      encode: see Encode.
      resolutions: of the versions.
      size_multiple: of heights and widths.
      too_small: see `mixture.Mixture`; "skip" leaves out the version of that resolution.
      workers: number of processes that load images; 0: threads of this one.
      instead: what is done about a damaged image, for the warning.

    Raises:
      FileError: too many images are damaged.
    """
    crops = _Crops(images, [Buckets(side, size_multiple) for side in resolutions], too_small)
    reader = SampleReader(crops, workers)
    skipped = Skipped(instead)
    each = sum(3 * side**2 for side in resolutions)
    window = max(1, min(WINDOW_BYTES // each, MAX_WINDOW))
    parts = [indices[start : start + window] for start in range(0, len(indices), window)]
    try:
        reader.start(parts[0] if parts else [])
        for part, following in zip(parts, [*parts[1:], []], strict=True):
            loaded = [reader.read(index) for index in part]
            reader.start(following)
            pixels = [
                image
                for record in loaded
                if isinstance(record, _Record)
                for image in record.by_resolution.values()
            ]
            codes = iter(encode(pixels))
            for record in loaded:
                if isinstance(record, DamagedImage):
                    skipped.add([str(record)], 0)
                    yield record
                else:
                    yield record.with_codes(codes)
            skipped.add([], len(loaded))
    finally:
        reader.close()


class EncodedImages:
    """Some of the images of a sequence as tokens in memory, for data of which that is little.

    Args:
      images: with pixels.
      indices: which of them can be read; others are a KeyError.
      encode, options: see `encoded_images`.
    """

    def __init__(
        self, images: Images, indices: Sequence[int], encode: Encode, **options: Any
    ) -> None:
        self._length = len(images)
        instead = "the next one replaces it"
        encoded = encoded_images(images, indices, encode, instead=instead, **options)
        encoded = tqdm(encoded, "encoding", len(indices), unit="image", delay=2)
        self._records = dict(zip(indices, encoded, strict=True))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> CaptionedImage:
        record = self._records[index]
        if isinstance(record, DamagedImage):
            raise record
        return record


class EncodedSource(EncodedImages):
    """A source of captioned images as tokens in memory.

    Attributes:
      location, skipped, splits: see CaptionedSource.
    """

    def __init__(self, source: CaptionedSource, encode: Encode, **options: Any) -> None:
        super().__init__(source, range(len(source)), encode, **options)
        self.location = source.location
        self.skipped = source.skipped
        self.splits = source.splits

    def captions_of(self, index: int) -> tuple[str, ...]:
        return self[index].captions


class _Record:
    """Captions and crops of an image."""

    def __init__(self, captions: tuple[str, ...], by_resolution: dict[int, np.ndarray]) -> None:
        self.captions = captions
        self.by_resolution = by_resolution

    def with_codes(self, codes: Iterator[np.ndarray]) -> CaptionedImage:
        versions = {
            side: Tokens(next(codes), image.shape[:2]) for side, image in self.by_resolution.items()
        }
        return CaptionedImage(self.captions, versions=versions)


class _Crops:
    """Images at each resolution, or the errors about them: samples of a `SampleReader`."""

    def __init__(self, images: Images, buckets: Sequence[Buckets], too_small: TooSmall) -> None:
        self._images = images
        self._buckets = buckets
        self._too_small = too_small

    def draw(self, n: int) -> _Record | DamagedImage:
        try:
            record = self._images[n]
        except DamagedImage as error:
            return error
        crops = {}
        for buckets in self._buckets:
            cropped, _ = fitted(record, buckets, self._too_small)
            if cropped is not None and cropped.image is not None:
                crops[buckets.resolution] = cropped.image
        return _Record(record.captions, crops)
