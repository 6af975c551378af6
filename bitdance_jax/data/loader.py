"""Batches of a source: shuffled, cropped, endless and exactly resumable.

Batch n is a function of (source, seed, n) alone. The order of an epoch depends on (seed, epoch),
the augmentation of a record on (seed, epoch, record), and a damaged image is replaced by the next
undamaged one of the source. So the iterator's state is the number of its next batch, and a run may
be resumed with another number of processes and workers.
"""

import functools
import gc
import math
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from bitdance_jax.config import AugmentConfig
from bitdance_jax.data import transforms
from bitdance_jax.data.crop_sizes import CropSizes
from bitdance_jax.data.records import ImageSource, Skipped, SmallImages
from bitdance_jax.data.worker_processes import follow_parent, starting_workers
from bitdance_jax.errors import FileError
from bitdance_jax.io.image_files import DamagedImage


CHUNK = 16
"""Records that a thread or worker process loads at a time. A batch is split into chunks so that all
of them load the batch that is needed next. With smaller chunks, passing them between processes
would cost as much as reading tokens."""
BATCHES_AHEAD = 2
MAX_THREADS = 16

ENDLESS = 2**32
"""Epochs of an endless loader, and the period of grain's shuffles. (grain's own endless length
overflows with batches of one.)"""

DAMAGED_IN_A_ROW = 20
"""If so many images in a row are damaged, reading ends with an error (see also
`records.Skipped`)."""

T = TypeVar("T")

ENLARGED, SKIPPED = "enlarged", "skipped"
"""Entries of a record: how many images smaller than their crop were read for it. They are counted,
and are no part of a batch."""

SMALL_IN_A_ROW = 1000
"""If so many images in a row are skipped because they are small, reading ends with an error."""

Record = dict[str, Any]
Load = Callable[[int], tuple[Record, tuple[str, ...]]]


class BatchIterator:
    """Batches of an endless or finite sequence of records; its state is {"next_batch": int}.

    Damaged images are reported on stderr, each once, by the process that loads their rows.

    Args:
      load: returns the record at a position, whose arrays have the same shapes for all records, and
        error messages about the damaged records that it replaces.
      length: number of records.
      batch_size: records per batch.
      rows: which rows of each batch are loaded, in ascending order; None: all.
      workers: number of processes that load; 0: threads of this one.

    Attributes:
      skipped: the error message about each damaged image, and how often it was read.
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
        self._started = False
        self._skipped = Skipped("the next one replaces it")
        self.skipped = self._skipped.counts
        self._small = {name: SmallImages(name) for name in (ENLARGED, SKIPPED)}
        self._running: list[grain.DatasetIterator] = []  # One, or none once closed.
        weakref.finalize(self, _close, self._running, workers)  # Also when the interpreter exits.
        self._start(0)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        chunks = []
        for _ in range(self._chunks.per_batch):
            try:
                records, skipped = self._next_chunk()
            except StopIteration:
                break
            chunks.append(records)
            self._skipped.add(skipped, len(records["label"]))
            for name, small in self._small.items():
                if name in records:
                    small.add(records.pop(name))
        if not chunks:
            raise StopIteration
        self._next_batch += 1
        return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def _next_chunk(self) -> tuple[Record, tuple[str, ...]]:
        if self._workers and not self._started:
            with starting_workers():  # grain starts them for the first chunk.
                self._started = True
                return next(self._running[0])
        return next(self._running[0])

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
        self._started = False
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
        self._running.append(iter(dataset.mp_prefetch(options, worker_init_fn=follow_parent)))


class _Chunks:
    """Random access to the chunks, of CHUNK rows or fewer, of the local rows of each batch."""

    def __init__(
        self, load: Load, length: int, batch_size: int, rows: Int[np.ndarray, "R"]
    ) -> None:
        if not len(rows) or rows[0] < 0 or rows[-1] >= batch_size or (np.diff(rows) <= 0).any():
            raise ValueError(
                f"rows must be ascending row numbers of a batch of {batch_size}, got {rows}"
            )
        self._load = load
        self._batch_size = batch_size
        self._rows = rows
        self.per_batch = -(-len(rows) // CHUNK)
        # A last smaller batch cannot be divided evenly between processes.
        self._length = length if len(rows) == batch_size else length - length % batch_size

    def __len__(self) -> int:
        full, rest = divmod(self._length, self._batch_size)
        return full * self.per_batch + -(-rest // CHUNK)

    def __getitem__(self, number: int) -> tuple[Record, tuple[str, ...]]:
        batch, chunk = divmod(number, self.per_batch)
        positions = batch * self._batch_size + self._rows[chunk * CHUNK : (chunk + 1) * CHUNK]
        loaded = [self._load(int(position)) for position in positions[positions < self._length]]
        records = {name: np.stack([record[name] for record, _ in loaded]) for name in loaded[0][0]}
        return records, tuple(error for _, skipped in loaded for error in skipped)


def make_loader(
    source: ImageSource,
    *,
    batch_size: int,
    seed: int,
    image_size: int | CropSizes | None = None,
    augment: AugmentConfig | None = None,
    workers: int = 0,
    shuffle: bool = True,
    repeat: bool = True,
    rows: Int[np.ndarray, "R"] | None = None,
) -> BatchIterator:
    """An iterator over batches {"image": uint8 [B, size, size, 3], "label": int32 [B]}, or of
    tokens {"codes", "label"}.

    Tokens may have several versions (`data.tokens.Versions`): a batch has one of them, chosen as an
    image would be cropped and flipped.

    Args:
      source: random access to records.
      batch_size: records in a batch, over all processes. Batches continue across the end of an
        epoch; without `repeat` the last one may be smaller.
      seed: of the order and the augmentation.
      image_size: side of the images in pixels, for all batches or for each; ignored for tokens.
      augment: random crops and flips; None: centre crops without flips.
      workers: number of processes that load; 0: threads of this one.
      shuffle: a new order in each epoch, in which every record occurs once.
      repeat: endless; otherwise one epoch.
      rows: which rows of each batch this process loads, in ascending order (`mesh.local_rows`);
        None: all. Without `repeat` and with some of the rows, a last smaller batch is omitted.

    Raises:
      FileError: on reading, if too many images are damaged: a tenth of a thousand, or 20 in a row.
    """
    order = grain.MapDataset.range(len(source))
    if shuffle:
        order = order.seed(seed).shuffle()
    if repeat:
        order = order.repeat(ENDLESS)
    load = functools.partial(
        _load,
        order=order,
        source=source,
        seed=seed,
        batch_size=batch_size,
        image_size=image_size,
        augment=augment,
    )
    return BatchIterator(load, len(order), batch_size, rows, workers)


def read_undamaged(source: ImageSource, index: int) -> tuple[Record, tuple[str, ...]]:
    """Record `index`, or the next undamaged one, as `next_undamaged`."""
    return next_undamaged(lambda number: dict(source[number]), index, len(source))


def next_undamaged(read: Callable[[int], T], index: int, count: int) -> tuple[T, tuple[str, ...]]:
    """What `read` returns for record `index` of `count`, or if that is damaged for the next
    undamaged one; and the error messages of those skipped.

    Raises:
      FileError: too many in a row are damaged.
    """
    skipped: list[str] = []
    for step in range(min(count, DAMAGED_IN_A_ROW)):
        try:
            return read((index + step) % count), tuple(skipped)
        except DamagedImage as error:
            skipped.append(str(error))
    several = "1 image is" if len(skipped) == 1 else f"{len(skipped)} images in a row are"
    raise FileError(f"{several} damaged; the last: {skipped[-1]}")


def _load(
    position: int,
    *,
    order: grain.MapDataset,
    source: ImageSource,
    seed: int,
    batch_size: int,
    image_size: int | CropSizes | None,
    augment: AugmentConfig | None,
) -> tuple[Record, tuple[str, ...]]:
    """The record at a position of the endless sequence."""
    index, epoch = order[position], position // len(source)
    rng = np.random.default_rng((seed, epoch, index))
    crop = augment is not None and rng.random() < transforms.cropped_share(augment, epoch)
    if isinstance(image_size, CropSizes):
        image_size = image_size.of_batch(position // batch_size)
    small = 0
    if augment is not None and augment.small_images == "skip" and image_size is not None:
        record, skipped, small = _read_large(source, index, image_size)
    else:
        record, skipped = read_undamaged(source, index)
    label = np.int32(record["label"])
    if "codes" in record:
        return {"codes": _version(record, augment, rng, crop), "label": label}, skipped
    image = record["image"]
    if image_size is not None and augment is not None:
        counts = {
            ENLARGED: np.int32(min(image.shape[:2]) < image_size),
            SKIPPED: np.int32(small),
        }
        image = transforms.augment(image, image_size, augment, rng=rng, crop=crop)
        return {"image": image, "label": label, **counts}, skipped
    if image_size is not None:
        image = transforms.centre_crop(image, image_size)
    return {"image": image, "label": label}, skipped


def _read_large(source: ImageSource, index: int, size: int) -> tuple[Record, tuple[str, ...], int]:
    """Record `index`, or the next one whose image has no side below `size`; error messages about
    damaged ones, and the number of small ones.

    Raises:
      FileError: too many in a row are small.
    """
    skipped: tuple[str, ...] = ()
    most = min(len(source), SMALL_IN_A_ROW)
    for small in range(most):
        record, errors = read_undamaged(source, (index + small) % len(source))
        skipped += errors
        if "image" not in record or min(record["image"].shape[:2]) >= size:
            return record, skipped, small
    raise FileError(
        f"{most} images in a row are smaller than the crop of {size} pixels; take a smaller crop, "
        "or set data.augment.small_images enlarge"
    )


def _version(
    record: Record, augment: AugmentConfig | None, rng: np.random.Generator, crop: bool
) -> np.ndarray:
    """The codes of a random crop if `crop` and if there are some; else of the centre crop or its
    mirror image."""
    if crop and "codes_crops" in record:
        return record["codes_crops"][rng.integers(len(record["codes_crops"]))]
    if augment is not None and "codes_flipped" in record and rng.random() < augment.flip:
        return record["codes_flipped"]
    return record["codes"]


def _close(running: list[grain.DatasetIterator], workers: int) -> None:
    while running:
        running.pop().close()
    if workers:
        # grain's iterators refer to each other. Collected when the interpreter exits, they print a
        # stack trace.
        gc.collect()
