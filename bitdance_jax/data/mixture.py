"""Training samples drawn from several sources of captioned images, at several resolutions.

Sample n is a function of the sources, the config, the seed and n alone, so a run that resumes needs
no state but the number of its next sample. Weights are kept exactly (`proportions`): of every 10
samples of a source with resolutions 2:7:1, one is of 1024 pixels. Each source is shuffled anew in
each of its epochs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bitdance_jax.data.buckets import Buckets, TooSmall, cover_crop, is_covered
from bitdance_jax.data.captioned import CaptionedImage, CaptionedSource
from bitdance_jax.data.captioned_tokens import CaptionedManifest
from bitdance_jax.data.loader import SMALL_IN_A_ROW, next_undamaged
from bitdance_jax.data.proportions import Proportions, Record, Shuffled
from bitdance_jax.errors import FileError


_RESOLUTIONS, _CAPTION = range(2)
"""First entries of the seeds, so that what they seed is independent."""


@dataclass(frozen=True)
class Sample:
    """A captioned image as the model is trained on it.

    Attributes:
      record: its image has the size of a bucket, or it has tokens.
      caption: one of the record's; None if it is dropped.
      size: height and width in pixels.
      source: location of the source.
      source_number: its index among the mixture's sources.
      resolution: that was drawn, in pixels.
      upscaled: whether the image was enlarged to cover its bucket.
      skipped: a message about each damaged record that this one replaces.
      too_small: the same about those that do not cover their buckets.
    """

    record: CaptionedImage
    caption: str | None
    size: tuple[int, int]
    source: str
    resolution: int
    source_number: int = 0
    upscaled: bool = False
    skipped: tuple[str, ...] = ()
    too_small: tuple[str, ...] = ()


class Mixture:
    """An endless sequence of samples.

    Args:
      sources: what is drawn from.
      weights: of the sources; None: their numbers of records.
      resolutions: of the samples, in pixels.
      resolution_weights: of these.
      size_multiple: see Buckets.
      text_drop: probability that a caption is dropped.
      too_small: what happens to an image that does not cover its bucket: it is enlarged, or the
        next one replaces it.
      seed: of everything that is random.

    Raises:
      ConfigError: a resolution is no multiple of `size_multiple`, or a source has tokens of other
        resolutions or sizes.
    """

    def __init__(
        self,
        sources: Sequence[CaptionedSource],
        *,
        seed: int,
        resolutions: Sequence[int],
        size_multiple: int,
        weights: Sequence[int | float] | None = None,
        resolution_weights: Sequence[int | float] | None = None,
        text_drop: float = 0.0,
        too_small: TooSmall = "upscale",
    ) -> None:
        self.sources = tuple(sources)
        self._seed = seed
        self._resolutions = tuple(resolutions)
        shares = resolution_weights or [1] * len(resolutions)
        self._buckets = {side: Buckets(side, size_multiple) for side in resolutions}
        used = [side for side, weight in zip(resolutions, shares, strict=True) if weight > 0]
        for source in sources:
            manifest = getattr(source, "manifest", None)
            if isinstance(manifest, CaptionedManifest):
                manifest.check_sizes(source.location, used, size_multiple)
        self._text_drop = text_drop
        self._too_small = too_small
        self._records = Shuffled([len(source) for source in sources], weights, seed)
        self._by_resolution = [
            Proportions(shares, (_RESOLUTIONS, seed, number)) for number in range(len(sources))
        ]

    def plan(self, n: int) -> tuple[Record, int]:
        """Record and resolution of sample n; reads nothing."""
        record = self._records[n]
        which, _ = self._by_resolution[record.source][record.number]
        return record, self._resolutions[which]

    def draw(self, n: int) -> Sample:
        """Sample n.

        If its record cannot be used, the next one of the source that can replaces it.

        Raises:
          FileError: too many in a row cannot be used, or the source cannot be read.
        """
        drawn, resolution = self.plan(n)
        source = self.sources[drawn.source]
        buckets = self._buckets[resolution]
        sample = _read(source, drawn.index, resolution, buckets, self._too_small)
        rng = np.random.default_rng((_CAPTION, self._seed, drawn.source, drawn.number))
        is_dropped = rng.random() < self._text_drop
        captions = sample.record.captions
        caption = captions[rng.integers(len(captions))]
        caption_or_none = None if is_dropped else caption
        return replace(sample, caption=caption_or_none, source_number=drawn.source)


def _read(
    source: CaptionedSource, index: int, resolution: int, buckets: Buckets, too_small: TooSmall
) -> Sample:
    """Record `index` in the size of its bucket, with its first caption, or the next record that
    can be used."""
    skipped: list[str] = []
    small: list[str] = []
    while len(small) < min(len(source), SMALL_IN_A_ROW):
        record, damaged = next_undamaged(source.__getitem__, index, len(source))
        skipped += damaged
        index = (index + len(damaged)) % len(source)
        in_bucket, upscaled = fitted(record, buckets, too_small)
        if in_bucket is not None:
            return Sample(
                record=in_bucket,
                caption=in_bucket.captions[0],
                size=in_bucket.size,
                source=source.location,
                resolution=resolution,
                upscaled=upscaled,
                skipped=tuple(skipped),
                too_small=tuple(small),
            )
        small.append(f"image {index} of {source.location} is too small for {resolution} pixels")
        index += 1
    raise FileError(
        f"{len(small)} images in a row are too small; the last: {small[-1]}; leave out the"
        f" resolution {resolution}, or set data.too_small='upscale'"
    )


def fitted(
    record: CaptionedImage, buckets: Buckets, too_small: TooSmall
) -> tuple[CaptionedImage | None, bool]:
    """The record in the size of its bucket, None if it is too small; and whether it was
    enlarged."""
    if record.versions is not None:
        tokens = record.versions.get(buckets.resolution)
        return None if tokens is None else CaptionedImage(record.captions, tokens=tokens), False
    assert record.image is not None
    size = buckets.nearest(*record.size)
    enlarged = not is_covered(record.image, size)
    if enlarged and too_small == "skip":
        return None, False
    return CaptionedImage(record.captions, cover_crop(record.image, size)), enlarged
