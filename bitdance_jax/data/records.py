"""What all sources of training records share: what a source is, how records are held out, names kept compactly."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from bitdance_jax.errors import UserError


HELD_OUT_STRIDE = 19
MAX_HELD_OUT = 1000

# A source is given up when more than this share of so many records is damaged.
WINDOW, DAMAGED_SHARE = 1000, 0.1

Split = Literal["train", "heldout", "all"]


@runtime_checkable
class ImageSource(Protocol):
    """A sequence of records: {"image": uint8 [H, W, 3] of any size, "label": int32}, or tokens in place of the image.

    Reading a record raises `images.DamagedImage` where that record alone is bad, and a UserError where the whole source is. Sources
    are read by threads and, pickled, by worker processes.

    One that lists files may also tell in `left_out` how many of them are no images, by their ending.

    Attributes:
      class_names: name of each label.
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Subset:
    """Some records of a source, in the order given."""

    def __init__(self, source: ImageSource, indices: Int[np.ndarray, "N"]) -> None:
        self.class_names = source.class_names
        self.left_out: Mapping[str, int] = getattr(source, "left_out", {})
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[int(self._indices[index])]


def split_indices(count: int, split: Split) -> Int[np.ndarray, "N"]:
    """Which of `count` records belong to a split, in order.

    Every 19th is held out, and of many records so much less than that, that about a thousand are: enough to watch a loss. Sources list
    a class's images together or shuffled, so the held-out ones spread over all classes; of the 1,906 emoji they are 100, of
    ImageNet's 1,281,167 images 999.
    """
    indices = np.arange(count)
    stride = max(HELD_OUT_STRIDE, -(-count // MAX_HELD_OUT))
    held_out = indices % stride == stride - 1
    return {"train": indices[~held_out], "heldout": indices[held_out], "all": indices}[split]


def select(source: ImageSource, split: Split) -> ImageSource:
    """The records of a split.

    Raises:
      UserError: the source is so small that none is left.
    """
    indices = split_indices(len(source), split)
    if len(indices) == 0:
        raise UserError(
            f"there are only {len(source)} images; every {HELD_OUT_STRIDE}th is held out, so give at least {HELD_OUT_STRIDE}, "
            "or set data.held_out"
        )
    return Subset(source, indices)


class Skipped:
    """Damaged images that a reader goes on without: each is named on stderr once, and too many end the work.

    Attributes:
      counts: the complaint about each, and how often it was met.
    """

    def __init__(self, instead: str) -> None:
        """`instead` says in the warning what is done, such as "it is left out"."""
        self.counts: dict[str, int] = {}
        self._instead = instead
        self._read, self._damaged = 0, 0

    def add(self, complaints: Iterable[str], records: int) -> None:
        """Notes the complaints met with so many records.

        Raises:
          UserError: more than a tenth of a thousand are damaged.
        """
        for complaint in complaints:
            self._damaged += 1
            self.counts[complaint] = self.counts.get(complaint, 0) + 1
            if self.counts[complaint] == 1:
                warning = (
                    f"warning: {complaint}; {self._instead} ({len(self.counts)} skipped so far)"
                )
                tqdm.write(warning, file=sys.stderr)
            if self._damaged > WINDOW * DAMAGED_SHARE:
                of = self._read + records
                raise UserError(
                    f"{self._damaged} of the last {of} images could not be read, {complaint}; is the data whole?"
                )
        self._read += records
        if self._read >= WINDOW:
            self._read, self._damaged = 0, 0


class Names:
    """A sequence of strings in two arrays: of a million names it takes a tenth of the memory of a list, and passes to worker processes
    at once.

    Attributes:
      text: all of them, one after the other, as the file system encodes them: uint8.
      ends: where each ends in `text`: int64 [N].
    """

    def __init__(self, text: np.ndarray, ends: Int[np.ndarray, "N"]) -> None:
        self.text, self.ends = text, ends

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


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns the operating system's complaint about `path` into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot read {os.fspath(error.filename or path)}: {error.strerror or error}"
        ) from error
