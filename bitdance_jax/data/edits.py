"""Pairs of images, and instructions that turn the first into the second, to train editing."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from bitdance_jax.data.buckets import Buckets
from bitdance_jax.data.captioned import CaptionedImage, Images, Skips, clean_captions
from bitdance_jax.data.captioned_folder import read_json_lines
from bitdance_jax.data.loader import next_undamaged
from bitdance_jax.data.mixture import fitted
from bitdance_jax.data.proportions import Shuffled
from bitdance_jax.data.split_fields import held_out_rows
from bitdance_jax.errors import FileError
from bitdance_jax.io.image_files import load_image


ANOTHER_FORM = "pairs of another form"
NO_INSTRUCTION = "pairs without an instruction"

_INSTRUCTION = 300
"""First entry of the seeds, so that what they seed is independent."""


@dataclass(frozen=True)
class Pair:
    """Two images of a source.

    Attributes:
      source, target: their numbers.
      instructions: any of them turns the source into the target; at least one, none empty.
    """

    source: int
    target: int
    instructions: tuple[str, ...]


@dataclass(frozen=True)
class Edit:
    """A pair with its images; their captions do not matter."""

    source: CaptionedImage
    target: CaptionedImage
    instructions: tuple[str, ...]


@dataclass(frozen=True)
class EditSample:
    """A pair as the model is trained on it.

    Attributes:
      record: its images have the sizes of buckets.
      instruction: one of the record's; None if it is dropped.
      location: of the source.
      skipped: a message about each damaged pair that this one replaces.
    """

    record: Edit
    instruction: str | None
    location: str
    skipped: tuple[str, ...] = ()


class EditSource:
    """A sequence of pairs, whose images may be in several of them.

    Args:
      location: where they come from, for messages.
      images: of all pairs.
      pairs: of their numbers.
      held_out: which pairs are; None: none.
      skipped: pairs that are left out, by reason.
    """

    def __init__(
        self,
        location: str,
        images: Images,
        pairs: Sequence[Pair],
        held_out: Bool[np.ndarray, "N"] | None = None,
        skipped: Skips | None = None,
    ) -> None:
        self.location = location
        self.images = images
        self.pairs = tuple(pairs)
        self.held_out = np.zeros(len(pairs), bool) if held_out is None else held_out
        self.skipped = Skips() if skipped is None else skipped

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Edit:
        """Raises a DamagedImage if one of its images cannot be read."""
        pair = self.pairs[index]
        return Edit(self.images[pair.source], self.images[pair.target], pair.instructions)

    def split(self) -> "tuple[EditSource | None, EditSource | None]":
        """The pairs to train on, and those held out; None where there are none."""
        return self._select(~self.held_out), self._select(self.held_out)

    def with_images(self, images: Images) -> "EditSource":
        """The same pairs, with the images in another form."""
        return EditSource(self.location, images, self.pairs, self.held_out, self.skipped)

    def _select(self, chosen: Bool[np.ndarray, "N"]) -> "EditSource | None":
        pairs = [self.pairs[index] for index in np.flatnonzero(chosen)]
        if not pairs:
            return None
        return EditSource(self.location, self.images, pairs, self.held_out[chosen], self.skipped)


class ImageFiles:
    """The images of some files, whose names are the captions."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder = folder
        self._names = tuple(names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> CaptionedImage:
        name = self._names[index]
        return CaptionedImage((name,), load_image(self._folder / name))


def read_edits(
    path: str | os.PathLike[str],
    image_folder: str | os.PathLike[str] | None = None,
    split_field: str | None = None,
) -> EditSource:
    """The pairs in a jsonl file, one JSON object a line:

        {"source": "day.png", "target": "night.png", "instruction": "make it night"}

    "instruction" is a string or a list of strings, of which one is drawn each time.

    Args:
      path: of the file.
      image_folder: that "source" and "target" are relative to; None: the file's folder.
      split_field: a field that tells which pairs are held out; None: none are.

    Raises:
      FileError: the file cannot be read, or has no pairs that can be used.
      ConfigError: the field marks none of them, or all.
    """
    folder = Path(path).parent if image_folder is None else Path(image_folder)
    skipped = Skips()
    numbers: dict[str, int] = {}
    pairs = []
    splits = []
    for line, record in read_json_lines(path):
        names = [record.get("source"), record.get("target")]
        instructions = clean_captions(record.get("instruction"))
        if not all(isinstance(name, str) and name for name in names):
            skipped.add(ANOTHER_FORM, f"line {line}")
        elif not instructions:
            skipped.add(NO_INSTRUCTION, f"line {line}")
        else:
            source, target = (numbers.setdefault(str(name), len(numbers)) for name in names)
            pairs.append(Pair(source, target, instructions))
            splits.append(str(record.get(split_field, "")) if split_field else "")
    location = os.fspath(path)
    if not pairs:
        reason = str(skipped) or "it is empty"
        raise FileError(
            f'{path} has no pairs that can be used: {reason}; a line is {{"source": "a.png", '
            '"target": "b.png", "instruction": "make it night"}',
            path,
        )
    held_out = held_out_rows(splits, location) if split_field else None
    return EditSource(location, ImageFiles(folder, list(numbers)), pairs, held_out, skipped)


class EditMixture:
    """An endless sequence of pairs: number n is a function of the sources, the seed and n.

    Args:
      sources: what is drawn from.
      seed: of everything that is random.
      resolution: of the images, see Buckets; each image has a size of its own.
      size_multiple: see Buckets.
      weights: of the sources; None: their numbers of pairs.
      text_drop: probability that the instruction is dropped.

    Raises:
      ConfigError: the resolution is no multiple of `size_multiple`.
    """

    def __init__(
        self,
        sources: Sequence[EditSource],
        *,
        seed: int,
        resolution: int,
        size_multiple: int,
        weights: Sequence[int | float] | None = None,
        text_drop: float = 0.0,
    ) -> None:
        self.sources = tuple(sources)
        self._seed = seed
        self._buckets = Buckets(resolution, size_multiple)
        self._text_drop = text_drop
        self._order = Shuffled([len(source) for source in sources], weights, seed)

    def draw(self, n: int) -> EditSample:
        """Sample n; if it is damaged, the next undamaged one of its source replaces it.

        Raises:
          FileError: too many in a row are damaged, or the source cannot be read.
        """
        drawn = self._order[n]
        source = self.sources[drawn.source]
        record, skipped = next_undamaged(source.__getitem__, drawn.index, len(source))
        source_image, target_image = map(self._fitted, (record.source, record.target))
        record = Edit(source_image, target_image, record.instructions)
        rng = np.random.default_rng((_INSTRUCTION, self._seed, drawn.source, drawn.number))
        is_dropped = rng.random() < self._text_drop
        instruction = record.instructions[rng.integers(len(record.instructions))]
        return EditSample(record, None if is_dropped else instruction, source.location, skipped)

    def _fitted(self, image: CaptionedImage) -> CaptionedImage:
        in_bucket, _ = fitted(image, self._buckets, "upscale")
        assert in_bucket is not None  # Nothing is too small.
        return in_bucket
