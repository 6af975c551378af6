"""Arrays that are read when they are needed, and how Orbax writes them: a part at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging


BATCH_BYTES = 64 * 2**20
"""Each batch is one commit to the disk, and makes files of its own: small arrays are better written together."""

CHUNK_BYTES = 16 * 2**20
"""Arrays are stored in blocks of at most so many bytes, so that a host may read its share of a sharded array and little else."""


Block = tuple[tuple[int | slice, ...], np.ndarray]
"""A region of an array, and what it holds."""


@dataclass(frozen=True)
class LazyArray:
    """An array in a file, or a stack of such.

    Attributes:
      shape, dtype: known without reading.
      read: reads it; a stack's part at the indices given as arguments, one for each of the stacked axes.
      stacked_axes: leading axes along which the parts lie; 0 for a single array.
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

    def chunk(self) -> tuple[int, ...]:
        """The shape of its blocks in a checkpoint: within one part, the longest axes halved until CHUNK_BYTES hold one."""
        sides = list(self.shape[self.stacked_axes :])
        while np.prod(sides, dtype=np.int64) * self.dtype.itemsize > CHUNK_BYTES:
            longest = sides.index(max(sides))
            sides[longest] = -(-sides[longest] // 2)
        return (1,) * self.stacked_axes + tuple(sides)

    def blocks(self) -> Iterator[Block]:
        """All of it, one part after the other."""
        chunk = self.chunk()[self.stacked_axes :]
        for index in np.ndindex(*self.shape[: self.stacked_axes]):
            part = self.read(*index)
            for number in np.ndindex(
                *(-(-side // size) for side, size in zip(part.shape, chunk, strict=True))
            ):
                region = tuple(
                    slice(n * size, min((n + 1) * size, side))
                    for n, size, side in zip(number, chunk, part.shape, strict=True)
                )
                yield index + region, part[region]

    def whole(self) -> np.ndarray:
        """All of it at once."""
        out = np.empty(self.shape, self.dtype)
        for index, values in self.blocks():
            out[index] = values
        return out


def as_lazy(array: LazyArray | np.ndarray | jax.Array) -> LazyArray:
    """Any array as a lazy one."""
    if isinstance(array, LazyArray):
        return array
    return LazyArray(array.shape, np.dtype(array.dtype), lambda: np.asarray(array))


class LazyArrayHandler(ocp.type_handlers.NumpyHandler):
    """Saves as Orbax saves numpy arrays, with little more than BATCH_BYTES of them in memory at a time, or one part.

    Nothing is read while something is being written, so that a source that turns out to be damaged leaves no writing behind.
    """

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(
        self, values: Sequence[LazyArray], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        for part in _batches([value.nbytes for value in values]):
            batch = (
                [value.whole() for value in values[part]]
                if part.stop - part.start > 1
                else values[part]
            )
            writer = _BatchWriter()
            for writing in await writer.serialize(batch, infos[part], args[part]):
                writing.result()
            if writer.failures:
                raise writer.failures[0]
        return []


class _BatchWriter(ocp.type_handlers.NumpyHandler):
    """Writes arrays that are in memory, or a lazy one.

    Attributes:
      failures: what went wrong. It is raised when all has been tried: Orbax would leave the other
        writes running, and these would make a folder anew that has been removed.
    """

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self.failures: list[Exception] = []

    async def _open_and_write(
        self, value: LazyArray | np.ndarray, tspec: dict[str, Any], ts_context: tensorstore.Context
    ) -> None:
        """Takes the place of Orbax's writing of an array; everything around it stays Orbax's."""
        try:
            if isinstance(value, np.ndarray):
                await super()._open_and_write(value, tspec, ts_context)
            else:
                _write_blocks(value, tspec, ts_context)
        except Exception as error:
            self.failures.append(error)


def _write_blocks(value: LazyArray, tspec: dict[str, Any], ts_context: tensorstore.Context) -> None:
    tspec["metadata"]["chunks"] = value.chunk()
    spec = tensorstore.Spec(tspec)
    store = tensorstore.open(spec, create=True, open=True, context=ts_context).result()
    blocks = value.blocks()
    while batch := list(_take(blocks)):
        writes = [store[i].write(x, can_reference_source_data_indefinitely=True) for i, x in batch]
        failures = [error for write in writes if (error := write.exception())]  # waits for each
        if failures:
            raise failures[0]


def _take(blocks: Iterator[Block]) -> Iterator[Block]:
    """The next blocks, BATCH_BYTES or a little more of them."""
    size = 0
    while size < BATCH_BYTES and (block := next(blocks, None)):
        size += block[1].nbytes
        yield block


def _batches(sizes: Sequence[int]) -> Iterator[slice]:
    """Runs of neighbours that BATCH_BYTES hold together, or single ones."""
    start, total = 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > BATCH_BYTES:
            yield slice(start, i)
            start, total = i, 0
        total += size
    yield slice(start, len(sizes))


def register() -> None:
    """Makes Orbax accept pytrees of LazyArray. What it writes is read like any other checkpoint."""
    if ocp.type_handlers.has_type_handler(LazyArray):
        return
    # Orbax warns that two types share the name "np.ndarray" in the checkpoint, which is what makes it like any other.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    ocp.type_handlers.register_type_handler(LazyArray, LazyArrayHandler(), override=True)
    logging.set_verbosity(verbosity)
