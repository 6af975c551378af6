"""Batches from a source: shuffled, cropped, endless and exactly resumable.

Batch n is a function of (source, seed, n) alone: the order of an epoch depends on (seed, epoch), the random draws of a record on
(seed, epoch, record), and a damaged image's place is taken by the next of the source that is whole. So the iterator's whole state is
the number of its next batch, and a run may be resumed with another number of processes and workers.
"""

import functools
import gc
import math
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from bitdance_jax.config import AugmentConfig
from bitdance_jax.data import transforms
from bitdance_jax.data.records import ImageSource, Skipped
from bitdance_jax.errors import UserError
from bitdance_jax.io.image_files import DamagedImage


# Records that a thread or worker process loads at a time. Batches are cut so that all of them work on the batch that is needed next, and
# one does not wait for the other's; fewer than this, and handing them over costs as much as reading tokens.
CHUNK = 16
BATCHES_AHEAD = 2
MAX_THREADS = 16

# Epochs of an endless loader, and the period of grain's shuffles. (grain's own endless length overflows with batches of one.)
ENDLESS = 2**32

# A source is given up when so many in a row are damaged, or too many in all (`records.Skipped`).
DAMAGED_IN_A_ROW = 20

Record = dict[str, Any]
Load = Callable[[int], tuple[Record, tuple[str, ...]]]


class BatchIterator:
    """Batches of an endless or finite sequence of records; its state is {"next_batch": int}.

    Damaged images are named on stderr, each once, by the process whose rows they are in.

    Args:
      load: the record at a position, arrays of the same shapes for all, and complaints about those it stands in for.
      length: how many there are.
      batch_size: records in a batch.
      rows: which rows of each batch are loaded, in ascending order; None: all.
      workers: processes that load; 0: threads of this one.

    Attributes:
      skipped: the complaint about each damaged image, and how often it was met.
    """

    def __init__(
        self,
        load: Load,
        length: int,
        batch_size: int,
        rows: Int[np.ndarray, "R"] | None = None,
        workers: int = 0,
    ) -> None:
        self._chunks = _Chunks(
            load, length, batch_size, np.arange(batch_size) if rows is None else np.asarray(rows)
        )
        self._workers = workers
        self._skipped = Skipped("the next one takes its place")
        self.skipped = self._skipped.counts
        self._running: list[grain.DatasetIterator] = []  # one, or none once closed
        weakref.finalize(self, _close, self._running, workers)  # at the interpreter's end too
        self._start(0)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        chunks = []
        for _ in range(self._chunks.per_batch):
            try:
                records, skipped = next(self._running[0])
            except StopIteration:
                break
            chunks.append(records)
            self._skipped.add(skipped, len(records["label"]))
        if not chunks:
            raise StopIteration
        self._next_batch += 1
        return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def get_state(self) -> dict[str, int]:
        return {"next_batch": self._next_batch}

    def set_state(self, state: dict[str, int]) -> None:
        self.close()
        self._start(state["next_batch"])

    def close(self) -> None:
        """Ends the worker processes."""
        _close(self._running, self._workers)

    def _start(self, next_batch: int) -> None:
        # grain's worker processes read absl's flags, which only absl's own programs parse.
        if self._workers and not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        self._next_batch = next_batch
        per_batch = self._chunks.per_batch
        rest = grain.MapDataset.source(self._chunks).slice(slice(next_batch * per_batch, None))
        ahead = BATCHES_AHEAD * per_batch
        if not self._workers:
            threads = min(os.cpu_count() or 1, MAX_THREADS)
            self._running.append(
                iter(rest.to_iter_dataset(grain.ReadOptions(threads, max(ahead, threads))))
            )
            return
        dataset = rest.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        options = grain.MultiprocessingOptions(
            self._workers, per_worker_buffer_size=math.ceil(ahead / self._workers)
        )
        self._running.append(iter(dataset.mp_prefetch(options, worker_init_fn=_start_worker)))


class _Chunks:
    """Random access to the parts, of CHUNK rows or less, that the local rows of each batch are cut into."""

    def __init__(
        self, load: Load, length: int, batch_size: int, rows: Int[np.ndarray, "R"]
    ) -> None:
        if not len(rows) or rows[0] < 0 or rows[-1] >= batch_size or (np.diff(rows) <= 0).any():
            raise ValueError(
                f"rows must be ascending numbers of rows of a batch of {batch_size}, got {rows}"
            )
        self._load, self._batch_size, self._rows = load, batch_size, rows
        self.per_batch = -(-len(rows) // CHUNK)
        # What is left for a last smaller batch cannot be shared out evenly.
        self._length = length if len(rows) == batch_size else length - length % batch_size

    def __len__(self) -> int:
        full, rest = divmod(self._length, self._batch_size)
        return full * self.per_batch + -(-rest // CHUNK)

    def __getitem__(self, number: int) -> tuple[Record, tuple[str, ...]]:
        batch, part = divmod(number, self.per_batch)
        positions = batch * self._batch_size + self._rows[part * CHUNK : (part + 1) * CHUNK]
        loaded = [self._load(int(position)) for position in positions[positions < self._length]]
        records = {name: np.stack([record[name] for record, _ in loaded]) for name in loaded[0][0]}
        return records, tuple(complaint for _, skipped in loaded for complaint in skipped)


def make_loader(
    source: ImageSource,
    *,
    batch_size: int,
    seed: int,
    image_size: int | None = None,
    augment: AugmentConfig | None = None,
    workers: int = 0,
    shuffle: bool = True,
    repeat: bool = True,
    rows: Int[np.ndarray, "R"] | None = None,
) -> BatchIterator:
    """An iterator over batches {"image": uint8 [B, size, size, 3], "label": int32 [B]}, or {"codes", "label"} of a source of tokens.

    Tokens may come in several versions (`data.tokens.Versions`): a batch holds one of them, chosen as an image would be cropped and
    flipped.

    Args:
      source: random access to records.
      batch_size: records in a batch of the whole job. Batches run on over the end of an epoch; without `repeat` the last one may be
        smaller.
      seed: of the order and of every random draw.
      image_size: side of the images in pixels; not used by tokens.
      augment: random crops, which may fade out, and flips, which do not; None: centre crops, unflipped.
      workers: processes that load; 0: threads of this one.
      shuffle: a new order each epoch, which holds every record once.
      repeat: go on for ever, or stop after one epoch.
      rows: which rows of each batch this process loads, in ascending order (`sharding.local_rows`); None: all. Without `repeat` and
        with some of the rows, a last smaller batch is left out.

    Raises:
      UserError: when read, too many images are damaged: a tenth of a thousand, or 20 in a row.
    """
    order = grain.MapDataset.range(len(source))
    if shuffle:
        order = order.seed(seed).shuffle()
    if repeat:
        order = order.repeat(ENDLESS)
    load = functools.partial(
        _load, order=order, source=source, seed=seed, image_size=image_size, augment=augment
    )
    return BatchIterator(load, len(order), batch_size, rows, workers)


def read_whole(source: ImageSource, index: int) -> tuple[Record, tuple[str, ...]]:
    """Record `index`, or where it is damaged the next one that is not; and the complaints about those passed over.

    Raises:
      UserError: too many in a row are damaged.
    """
    skipped: list[str] = []
    for step in range(min(len(source), DAMAGED_IN_A_ROW)):
        try:
            return dict(source[(index + step) % len(source)]), tuple(skipped)
        except DamagedImage as error:
            skipped.append(str(error))
    raise UserError(
        f"{len(skipped)} of {len(skipped)} images in a row are damaged; the last: {skipped[-1]}"
    )


def _load(
    position: int,
    *,
    order: grain.MapDataset,
    source: ImageSource,
    seed: int,
    image_size: int | None,
    augment: AugmentConfig | None,
) -> tuple[Record, tuple[str, ...]]:
    """The record at `position` of the endless sequence."""
    index, epoch = order[position], position // len(source)
    rng = np.random.default_rng((seed, epoch, index))
    crop = augment is not None and rng.random() < transforms.cropped_share(augment, epoch)
    record, skipped = read_whole(source, index)
    label = np.int32(record["label"])
    if "codes" in record:
        return {"codes": _version(record, augment, rng, crop), "label": label}, skipped
    image = record["image"]
    if image_size is not None:
        image = (
            transforms.augment(image, image_size, augment, rng, crop)
            if augment
            else transforms.centre_crop(image, image_size)
        )
    return {"image": image, "label": label}, skipped


def _version(
    record: Record, augment: AugmentConfig | None, rng: np.random.Generator, crop: bool
) -> np.ndarray:
    """A random crop, flips included, where there are some and one is due; else the centre crop or its mirror image."""
    if crop and "codes_crops" in record:
        return record["codes_crops"][rng.integers(len(record["codes_crops"]))]
    if augment is not None and "codes_flipped" in record and rng.random() < augment.flip:
        return record["codes_flipped"]
    return record["codes"]


def _close(running: list[grain.DatasetIterator], workers: int) -> None:
    while running:
        running.pop().close()
    if workers:
        gc.collect()  # grain's iterators refer to each other; left to the interpreter's end, theirs is a stack trace


def _start_worker(index: int, count: int) -> None:
    """Leaves Ctrl-C to the parent, and ends the worker with the parent even when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=follow_parent, daemon=True).start()
