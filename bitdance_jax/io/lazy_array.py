"""Arrays that are read when they are needed, and an Orbax handler that writes them in parts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging


BATCH_BYTES = 64 * 2**20
"""Bytes written at once. A batch is one commit with files of its own, so small arrays share one."""

CHUNK_BYTES = 16 * 2**20
"""Largest chunk of a stored array: a host can read its shard of an array and little else."""


Block = tuple[tuple[int | slice, ...], np.ndarray]
"""The index of a region of an array, and its values."""


@dataclass(frozen=True)
class LazyArray:
    """An array in a file, or a stack of such arrays.

    Attributes:
      shape: known without reading.
      dtype: known without reading.
      read: reads the array, or the layer of a stack at the indices given as arguments, one for each
        stacked axis.
      stacked_axes: number of leading axes that are stacked; 0 for a single array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[..., np.ndarray]
    stacked_axes: int = 0

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def chunk_shape(self) -> tuple[int, ...]:
        """The shape of its chunks in a checkpoint.

        A chunk lies within one layer; its longest axis is halved until it fits into CHUNK_BYTES.
        """
        sides = list(self.shape[self.stacked_axes :])
        while np.prod(sides, dtype=np.int64) * self.dtype.itemsize > CHUNK_BYTES:
            longest = sides.index(max(sides))
            sides[longest] = -(-sides[longest] // 2)
        return (1,) * self.stacked_axes + tuple(sides)

    def blocks(self) -> Iterator[Block]:
        """All values in chunks, one layer after the other."""
        chunk = self.chunk_shape()[self.stacked_axes :]
        for index in np.ndindex(*self.shape[: self.stacked_axes]):
            layer = self.read(*index)
            num_chunks = [-(-side // size) for side, size in zip(layer.shape, chunk, strict=True)]
            for position in np.ndindex(*num_chunks):
                region = tuple(
                    slice(n * size, min((n + 1) * size, side))
                    for n, size, side in zip(position, chunk, layer.shape, strict=True)
                )
                yield index + region, layer[region]

    def read_all(self) -> np.ndarray:
        """The complete array."""
        out = np.empty(self.shape, self.dtype)
        for index, values in self.blocks():
            out[index] = values
        return out


def as_lazy(array: LazyArray | np.ndarray | jax.Array) -> LazyArray:
    """Any array as a LazyArray."""
    if isinstance(array, LazyArray):
        return array
    return LazyArray(array.shape, np.dtype(array.dtype), lambda: np.asarray(array))


class LazyArrayHandler(ocp.type_handlers.NumpyHandler):
    """Saves arrays in Orbax's format for numpy arrays.

    At most BATCH_BYTES of them, or one layer, are in memory at a time. Nothing is read during a
    write, so that no write is left running when a source turns out to be damaged.
    """

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(
        self, values: Sequence[LazyArray], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        for part in _batches([value.nbytes for value in values]):
            batch: Sequence[Any] = values[part]
            if len(batch) > 1:
                batch = [value.read_all() for value in batch]
            writer = _BatchWriter()
            for future in await writer.serialize(batch, infos[part], args[part]):
                future.result()
            if writer.failures:
                raise writer.failures[0]
        return []


class _BatchWriter(ocp.type_handlers.NumpyHandler):
    """Writes numpy arrays, or one LazyArray.

    Attributes:
      failures: exceptions of the writes. They are raised after all writes have ended: Orbax would
        leave the others running, and these would recreate a folder that has been removed.
    """

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self.failures: list[Exception] = []

    async def _open_and_write(
        self, value: LazyArray | np.ndarray, tspec: dict[str, Any], ts_context: tensorstore.Context
    ) -> None:
        """Overrides how Orbax writes one array."""
        try:
            if isinstance(value, np.ndarray):
                await super()._open_and_write(value, tspec, ts_context)
            else:
                _write_blocks(value, tspec, ts_context)
        except Exception as error:
            self.failures.append(error)


def _write_blocks(value: LazyArray, tspec: dict[str, Any], ts_context: tensorstore.Context) -> None:
    tspec["metadata"]["chunks"] = value.chunk_shape()
    spec = tensorstore.Spec(tspec)
    store = tensorstore.open(spec, create=True, open=True, context=ts_context).result()
    blocks = value.blocks()
    while batch := list(_take_batch(blocks)):
        writes = [store[i].write(x, can_reference_source_data_indefinitely=True) for i, x in batch]
        failures = [error for write in writes if (error := write.exception())]  # waits for each
        if failures:
            raise failures[0]


def _take_batch(blocks: Iterator[Block]) -> Iterator[Block]:
    """The next blocks, until they have BATCH_BYTES."""
    size = 0
    while size < BATCH_BYTES and (block := next(blocks, None)):
        size += block[1].nbytes
        yield block


def _batches(sizes: Sequence[int]) -> Iterator[slice]:
    """Ranges of consecutive arrays with at most BATCH_BYTES in sum, or of one array."""
    start = 0
    total = 0
    for i, size in enumerate(sizes):
        if i > start and total + size > BATCH_BYTES:
            yield slice(start, i)
            start = i
            total = 0
        total += size
    yield slice(start, len(sizes))


def register() -> None:
    """Makes Orbax accept pytrees of LazyArray. The checkpoint is one of numpy arrays."""
    if ocp.type_handlers.has_type_handler(LazyArray):
        return
    # Orbax warns that two types share the name "np.ndarray". That is intended: it makes the
    # checkpoint one of numpy arrays.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    ocp.type_handlers.register_type_handler(LazyArray, LazyArrayHandler(), override=True)
    logging.set_verbosity(verbosity)
