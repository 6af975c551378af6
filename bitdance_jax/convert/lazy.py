"""Arrays that are read when they are needed, and how Orbax writes them: one at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from absl import logging


BATCH_BYTES = 64 * 2**20
"""Each batch is one commit to the disk, and makes files of its own: small arrays are better written together."""


@dataclass(frozen=True)
class LazyArray:
    """An array in a file.

    Attributes:
      shape, dtype: known without reading.
      read: reads it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class LazyArrayHandler(ocp.type_handlers.NumpyHandler):
    """Saves as Orbax saves numpy arrays, with BATCH_BYTES of them in memory at a time, or one larger."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values: Sequence[LazyArray], infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        for part in _batches(values):
            for writing in await super().serialize([value.read() for value in values[part]], infos[part], args[part]):
                writing.result()
        return []


def _batches(values: Sequence[LazyArray]) -> Iterator[slice]:
    start, size = 0, 0
    for i, value in enumerate(values):
        if i > start and size + value.nbytes > BATCH_BYTES:
            yield slice(start, i)
            start, size = i, 0
        size += value.nbytes
    yield slice(start, len(values))


def register() -> None:
    """Makes Orbax accept pytrees of LazyArray. What it writes is read like any other checkpoint."""
    if ocp.type_handlers.has_type_handler(LazyArray):
        return
    # Orbax warns that two types share the name "np.ndarray" in the checkpoint, which is what makes it like any other.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    ocp.type_handlers.register_type_handler(LazyArray, LazyArrayHandler(), override=True)
    logging.set_verbosity(verbosity)
