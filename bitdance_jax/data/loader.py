"""Batches from a source: shuffled, cropped, endless and exactly resumable.

Batch n is a function of (source, seed, n) alone: the order of an epoch depends on (seed, epoch), the random draws of a record on
(seed, epoch, record). So the iterator's whole state is the number of its next batch, and a run may be resumed with another number of
workers.
"""

import functools
import multiprocessing
import os
import signal
import threading
from typing import Any

import grain
import numpy as np
from absl import flags

from bitdance_jax.config import AugmentConfig
from bitdance_jax.data import transforms
from bitdance_jax.data.sources import PictureSource


# Batches are read ahead by threads in each process; more than this only costs memory.
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)

# Epochs of an endless loader, and the period of grain's shuffles. (grain's own endless length overflows with batches of one.)
ENDLESS = 2**32


class BatchIterator(grain.DatasetIterator[dict[str, np.ndarray]]):
    """Iterates over a dataset of batches; its state is {"next_batch": int}."""

    def __init__(self, batches: grain.MapDataset, workers: int):
        super().__init__()
        self._batches = batches
        self._workers = workers
        self._start(0)

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self._next_batch += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"next_batch": self._next_batch}

    def set_state(self, state: dict[str, int]) -> None:
        self._iterator.close()
        self._start(state["next_batch"])

    def close(self) -> None:
        """Ends the worker processes."""
        self._iterator.close()

    def _start(self, next_batch: int) -> None:
        # grain's worker processes read absl's flags, which only absl's own programs parse.
        if self._workers and not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        self._next_batch = next_batch
        rest = self._batches.slice(slice(next_batch, None)).to_iter_dataset(READ_OPTIONS)
        workers = grain.MultiprocessingOptions(num_workers=self._workers)
        self._iterator = iter(rest.mp_prefetch(workers, worker_init_fn=_start_worker))


def _start_worker(index: int, count: int) -> None:
    """Leaves Ctrl-C to the parent, and ends the worker with the parent even when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=follow_parent, daemon=True).start()


def make_loader(
    source: PictureSource,
    *,
    batch_size: int,
    seed: int,
    image_size: int | None = None,
    augment: AugmentConfig | None = None,
    workers: int = 0,
    shuffle: bool = True,
    repeat: bool = True,
) -> BatchIterator:
    """An iterator over batches {"image": uint8 [B, size, size, 3], "label": int32 [B]}, or over cached latents.

    Cached latents may come in two versions, "codes" of the picture and "codes_flipped" of its mirror image: a batch then holds one of
    them as "codes", chosen as a flip is.

    Args:
      source: random access to records.
      batch_size: records in a batch. Batches run on over the end of an epoch; without `repeat` the last one may be smaller.
      seed: of the order and of every random draw.
      image_size: side of the pictures in pixels; not used by cached latents.
      augment: random crops and flips; None: centre crops.
      workers: processes that load; 0: threads of this one.
      shuffle: a new order each epoch, which holds every record once.
      repeat: go on for ever, or stop after one epoch.
    """
    records = grain.MapDataset.range(len(source))
    if shuffle:
        records = records.seed(seed).shuffle()
    if repeat:
        records = records.repeat(ENDLESS)
    load = functools.partial(_load, source=source, seed=seed, image_size=image_size, augment=augment)
    return BatchIterator(records.map_with_index(load).batch(batch_size), workers)


def _load(
    position: int, index: int, *, source: PictureSource, seed: int, image_size: int | None, augment: AugmentConfig | None
) -> dict[str, Any]:
    """Record `index` of the source, as it is at `position` of the endless sequence of records."""
    epoch = position // len(source)
    rng = np.random.default_rng((seed, epoch, index))
    if augment is not None and rng.random() >= transforms.augmented_share(augment, epoch):
        augment = None

    record = dict(source[index])
    flipped_codes = record.pop("codes_flipped", None)
    if flipped_codes is not None and augment is not None and rng.random() < augment.flip:
        record["codes"] = flipped_codes
    if "image" in record and image_size is not None:
        image = record["image"]
        record["image"] = (
            transforms.centre_crop(image, image_size) if augment is None else transforms.augment(image, image_size, augment, rng)
        )
    record["label"] = np.int32(record["label"])
    return record
