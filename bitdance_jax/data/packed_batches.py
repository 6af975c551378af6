"""Batches of packed rows from samples of captioned images: endless and exactly resumable.

Row r of a batch of B rows has its own stream of samples: its k-th document is sample r + B k. So
neither the number of processes nor that of devices matters.
"""

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from bitdance_jax.data import loader, packing
from bitdance_jax.data.documents import Document, Image
from bitdance_jax.data.packing import Lengths, PackingState, RowPacker
from bitdance_jax.data.records import Skipped
from bitdance_jax.data.worker_processes import follow_parent, starting_workers
from bitdance_jax.errors import FileError, ResourceError


T = TypeVar("T")
Drawn = TypeVar("Drawn", covariant=True)

SAMPLES_AHEAD = 32
"""Samples of each row that are loaded ahead: about those of one row."""

MAX_SAMPLES_AHEAD = 512
"""Of all rows of a process, to bound the memory: 1.5 GB of images of 1024 pixels."""

SKIPPED_IN_A_ROW = 1000
"""If so many documents in a row are skipped, reading ends with an error."""

REPORTED = 20
"""Skipped documents and cut captions that are named, each once."""


@runtime_checkable
class Samples(Protocol[Drawn]):
    """An endless sequence (`data.mixture.Mixture`); pickled for worker processes."""

    def draw(self, n: int) -> Drawn: ...


@dataclass(frozen=True)
class Note:
    """Something about a sample that is not used as it is.

    Attributes:
      problem: what is counted, such as "captions cut".
      line: for stderr.
    """

    problem: str
    line: str


@dataclass(frozen=True)
class Prepared:
    """The document of a sample.

    Attributes:
      document: None if the sample is skipped.
      damaged: error messages about images that this sample replaces.
      notes: see Note.
    """

    document: Document | None
    damaged: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()


class Documented(Generic[T]):
    """Samples with their documents; pickled for worker processes."""

    def __init__(self, samples: Samples[T], to_document: Callable[[T], Prepared]) -> None:
        self._samples = samples
        self._to_document = to_document

    def draw(self, n: int) -> Prepared:
        return self._to_document(self._samples.draw(n))


Encode = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
"""Packed bits uint8 [h, w, bytes] of RGB images uint8 [H, W, 3] of any sizes. Those of an image do
not depend on the other images."""


class SampleReader(Generic[T]):
    """Samples by their number, some of them loaded ahead by threads or processes."""

    def __init__(self, samples: Samples[T], workers: int = 0) -> None:
        """`workers`: number of processes; 0: threads of this one."""
        self._samples = samples
        self._started: dict[int, Future[T]] = {}
        if workers:
            self._pool: Executor = ProcessPoolExecutor(
                workers, get_context("spawn"), _start_worker, (samples,)
            )
        else:
            self._pool = ThreadPoolExecutor(min(os.cpu_count() or 1, loader.MAX_THREADS))
        self._draw: Callable[[int], T] = _draw_in_worker if workers else samples.draw

    def start(self, numbers: Iterable[int]) -> None:
        """Begins to load samples."""
        for number in numbers:
            if number not in self._started:
                with starting_workers():  # The pool starts them when there is work.
                    self._started[number] = self._pool.submit(self._draw, number)

    def read(self, number: int) -> T:
        """A sample. One that is read again is loaded again.

        Raises:
          UserError: as the samples'.
          ResourceError: a worker process ended.
        """
        try:
            self.start([number])
            return self._started.pop(number).result()
        except BrokenExecutor:
            raise ResourceError(
                "a worker process of the data loader ended: it had too little memory (lower "
                "data.workers), or the script that trains lacks `if __name__ == '__main__':`, "
                "without which each worker starts the script again"
            ) from None

    def forget(self) -> None:
        """Drops what was loaded ahead."""
        for future in self._started.values():
            future.cancel()
        self._started.clear()

    def close(self) -> None:
        """Ends the threads or processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class PackedBatches:
    """An iterator over batches of `packing.Row`, and "sources": int32 [number of sources], the
    numbers of documents from each.

    Its state has one entry for each row of this process; `set_state` takes those of all rows. The
    next batches are prepared by a thread while the devices work.
    """

    def __init__(
        self,
        reader: SampleReader[Prepared],
        encode: Encode,
        *,
        batch_size: int,
        rows: Int[np.ndarray, "R"],
        lengths: Lengths,
        tokens_per_step: int,
        num_bytes: int,
        num_sources: int = 1,
        ahead: int = 1,
    ) -> None:
        """
        Args:
          reader: of the documents.
          encode: images that have pixels only.
          batch_size: B, over all processes.
          rows: which rows of each batch this process loads.
          lengths: of the rows.
          tokens_per_step: P.
          num_bytes: of a token's packed bits.
          num_sources: that the documents are from.
          ahead: number of batches that are prepared beyond the one that is asked for.
        """
        self._reader = reader
        self._damaged = Skipped("the next one replaces it")
        self._notes = Notes()
        self._encode = encode
        self._batch_size = batch_size
        self._rows = [int(row) for row in rows]
        self._lengths = lengths
        self._block = tokens_per_step
        self._num_bytes = num_bytes
        self._num_sources = num_sources
        self._ahead = ahead
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[tuple[dict[str, Any], dict[str, Any]]]] = deque()
        self.set_state({"rows": {}})

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        while len(self._pending) < 1 + self._ahead:
            self._pending.append(self._thread.submit(self._next_batch))
        batch, self._state = self._pending.popleft().result()
        return batch

    def get_state(self) -> dict[str, Any]:
        """{"rows": {number of a row: its `PackingState`}} after the last batch."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        while self._pending:
            future = self._pending.popleft()
            if not future.cancel():
                # An error of a batch that nobody asks for is of no interest.
                with contextlib.suppress(Exception):
                    future.result()
        self._reader.forget()
        self._skipped = 0
        saved = state["rows"]
        self._packers = {row: self._packer(row, saved.get(str(row), {})) for row in self._rows}
        self._state = self._current_state()

    def close(self) -> None:
        """Ends the thread and the reader."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._reader.close()

    def _current_state(self) -> dict[str, Any]:
        states = {row: packer.state for row, packer in self._packers.items()}
        return {
            "rows": {
                str(row): {"next_document": s.next_document, "waiting": list(s.waiting)}
                for row, s in states.items()
            }
        }

    def _packer(self, row: int, saved: dict[str, Any]) -> RowPacker:
        ahead = max(1, min(SAMPLES_AHEAD, MAX_SAMPLES_AHEAD // len(self._rows)))

        def sample(k: int) -> int:
            return row + self._batch_size * k

        def read(k: int) -> Document | None:
            # A number that is not the newest one is of a document that waited before resuming.
            if k + 1 == packer.state.next_document:
                self._reader.start(sample(later) for later in range(k, k + ahead))
            prepared = self._reader.read(sample(k))
            self._damaged.add(prepared.damaged, 1)
            for note in prepared.notes:
                self._notes.add(note)
            self._check_skipped(prepared.document)
            return prepared.document

        packer = RowPacker(read, self._lengths, PackingState(**saved))
        return packer

    def _check_skipped(self, document: Document | None) -> None:
        is_used = document is not None and len(document) <= self._lengths.longest
        self._skipped = 0 if is_used else self._skipped + 1
        if self._skipped >= SKIPPED_IN_A_ROW:
            raise FileError(
                f"{self._skipped} samples in a row were skipped: none has at most "
                f"{self._lengths.longest} tokens (data.packing.document); is the data as intended?"
            )

    def _next_batch(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """A batch and the state after it."""
        rows = [self._packers[row].next_row() for row in self._rows]
        state = self._current_state()
        return packing.stack([self._pack(row) for row in self._encoded(rows)]), state

    def _pack(self, documents: Sequence[Document]) -> packing.Row:
        length = self._lengths.row
        row = packing.pack(
            documents,
            length,
            patches=max_patches(length, self._block),
            block=self._block,
            num_bytes=self._num_bytes,
        )
        sources = np.array([document.source for document in documents], np.int32)
        counts = np.bincount(sources, minlength=self._num_sources)
        return row | {"sources": counts.astype(np.int32)}

    def _encoded(self, rows: list[list[Document]]) -> list[list[Document]]:
        """The documents, all of whose images have bits: those of all rows are encoded together."""
        pixels = [
            image.pixels
            for row in rows
            for document in row
            for image in document.images
            if image.pixels is not None
        ]
        codes = iter(self._encode(pixels) if pixels else [])
        side = round(self._block**0.5)

        def encoded(image: Image) -> Image:
            return image if image.pixels is None else image.encoded(next(codes), side)

        return [
            [document.with_images(map(encoded, document.images)) for document in row]
            for row in rows
        ]


def max_patches(row: int, tokens_per_step: int) -> int:
    """The most patches that a row of so many tokens can have."""
    return row // tokens_per_step


class Notes:
    """Lines on stderr about samples that are not used as they are, the first few, each once."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._shown: set[str] = set()

    def add(self, note: Note) -> None:
        if note.line in self._shown or len(self._shown) >= REPORTED:
            return
        self._shown.add(note.line)
        self._counts[note.problem] = count = self._counts.get(note.problem, 0) + 1
        more = "; further ones are not named" if len(self._shown) == REPORTED else ""
        tqdm.write(f"note: {note.line} ({note.problem}: {count}{more})", file=sys.stderr)


_worker_samples: Any = None


def _start_worker(samples: Any) -> None:
    global _worker_samples
    follow_parent()
    _worker_samples = samples


def _draw_in_worker(number: int) -> Any:
    return _worker_samples.draw(number)
