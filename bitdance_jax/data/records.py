"""What sources of records share: their protocol, the held-out split, damaged images, file names."""

import os
import sys
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from bitdance_jax.errors import ConfigError, FileError


HELD_OUT_STRIDE = 19
MAX_HELD_OUT = 1000

WINDOW = 1000
DAMAGED_SHARE = 0.1
"""If more than this share of WINDOW records is damaged, reading ends with an error."""

Split = Literal["train", "heldout", "all"]


@runtime_checkable
class ImageSource(Protocol):
    """A sequence of records {"image": uint8 [H, W, 3] of any size, "label": int32}, or of tokens.

    Reading a record raises `image_files.DamagedImage` if only that record is damaged, and a
    UserError if the source cannot be read. Sources are read by several threads and, pickled, by
    worker processes. A source that lists files may have an attribute `skipped`: the numbers of
    files that are no images, by their ending.

    An attribute `held_out`, bool [N], tells which records a source itself holds out; without one,
    or if it is None, `split_indices` does.

    Attributes:
      class_names: the name of each label.
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Subset:
    """Some records of a source, in the given order."""

    def __init__(self, source: ImageSource, indices: Int[np.ndarray, "N"]) -> None:
        self.class_names = source.class_names
        self.skipped: Mapping[str, int] = getattr(source, "skipped", {})
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[int(self._indices[index])]


def split_indices(count: int, split: Split) -> Int[np.ndarray, "N"]:
    """The indices of a split among `count` records, in order.

    Every 19th record is held out, or fewer, so that there are about 1000, which is enough to watch
    a loss. Sources order images by class or randomly, so all classes are among them. There are 999
    of ImageNet's 1,281,167 images.
    """
    indices = np.arange(count)
    stride = max(HELD_OUT_STRIDE, -(-count // MAX_HELD_OUT))
    held_out = indices % stride == stride - 1
    return {"train": indices[~held_out], "heldout": indices[held_out], "all": indices}[split]


def select(source: ImageSource, split: Split) -> ImageSource:
    """The records of a split.

    Raises:
      ConfigError: the source is too small for the split.
    """
    marked = getattr(source, "held_out", None)
    if marked is None:
        indices = split_indices(len(source), split)
    elif split == "all":
        indices = np.arange(len(source))
    else:
        indices = np.flatnonzero(marked == (split == "heldout"))
    if len(indices) == 0:
        raise ConfigError(
            f"there are only {len(source)} images, of which every {HELD_OUT_STRIDE}th is held out; "
            f"use at least {HELD_OUT_STRIDE}, or set data.held_out",
            "data.held_out",
        )
    return Subset(source, indices)


class Skipped:
    """Damaged images that a reader skips. Each is reported on stderr once; too many are an error.

    Attributes:
      counts: the error message about each, and how often it was read.
    """

    def __init__(self, instead: str) -> None:
        """`instead`: what is done, for the warning, such as "it is skipped"."""
        self.counts: dict[str, int] = {}
        self._instead = instead
        self._read = 0
        self._damaged = 0

    def add(self, errors: Iterable[str], records: int) -> None:
        """Adds the error messages about damaged images among the next `records` records.

        Raises:
          FileError: more than DAMAGED_SHARE of WINDOW records are damaged.
        """
        for error in errors:
            self._damaged += 1
            self.counts[error] = self.counts.get(error, 0) + 1
            if self.counts[error] == 1:
                count = len(self.counts)
                tqdm.write(
                    f"warning: {error}; {self._instead} ({count} skipped so far)", file=sys.stderr
                )
            if self._damaged > WINDOW * DAMAGED_SHARE:
                raise FileError(
                    f"{self._damaged} of the last {self._read + records} images could not be read, "
                    f"{error}; is the data complete?"
                )
        self._read += records
        if self._read >= WINDOW:
            self._read = 0
            self._damaged = 0


class SmallImages:
    """Counts images that are smaller than their crops; reports 1, 10, 100, 1,000, ... of them.

    Attributes:
      count: how many so far.
    """

    def __init__(self, treatment: str) -> None:
        """`treatment`: what is done with them, "enlarged" or "skipped"."""
        self.count = 0
        self._treatment = treatment
        self._read = 0
        self._next = 1

    def add(self, counts: Int[np.ndarray, "B"]) -> None:
        """Adds records: the number of small images read for each."""
        self.count += int(counts.sum())
        self._read += len(counts)
        if self.count >= self._next:
            tqdm.write(
                f"note: images smaller than their crops are {self._treatment} "
                f"(data.augment.small_images): {self.count:,} so far, for {self._read:,} read",
                file=sys.stderr,
            )
            self._next = 10 ** len(str(self.count))


class Names:
    """A sequence of strings in two arrays.

    A million names need a tenth of a list's memory, and are pickled for worker processes at once.

    Attributes:
      text: the concatenated names in the file system's encoding, uint8.
      ends: the end of each name in `text`, int64 [N].
    """

    def __init__(self, text: np.ndarray, ends: Int[np.ndarray, "N"]) -> None:
        self.text = text
        self.ends = ends

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        encoded = [os.fsencode(name) for name in names]
        ends = np.fromiter(accumulate(map(len, encoded)), np.int64, len(encoded))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.text[start : self.ends[index]].tobytes())
