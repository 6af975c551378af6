"""The weights of a model folder: an Orbax checkpoint, read at once or array by array.

Paths are absolute, on a local disk or under gs://.
"""

import contextlib
import math
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax import traverse_util

from bitdance_jax.errors import FileError, ResourceError, UserError
from bitdance_jax.io import lazy_array
from bitdance_jax.nn.stack import STACKED, stacked_axes
from bitdance_jax.perf import hardware


class StoredArray:
    """An array in a checkpoint. Indexing it reads the indexed part alone.

    `jax.make_array_from_callback` makes a sharded array of one.

    Attributes:
      shape: of the stored array.
      dtype: of the stored array.
    """

    def __init__(self, store: tensorstore.TensorStore, weights: epath.Path) -> None:
        self._store = store
        self._weights = weights
        self.shape: tuple[int, ...] = tuple(store.shape)
        self.dtype = np.dtype(store.dtype.numpy_dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        """The values at non-negative integers, slices or `...`, as of a numpy array.

        Raises:
          FileError: they are damaged.
        """
        part = self._store[index]
        with _read_errors(self._weights):
            return np.asarray(part.read().result())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self[...]
        return array if dtype is None else array.astype(dtype)

    def astype(self, dtype: Any) -> "StoredArray":
        """The array in another type; nothing is read."""
        return StoredArray(tensorstore.cast(self._store, np.dtype(dtype)), self._weights)

    def part(self, index: tuple[int, ...]) -> "StoredArray":
        """The sub-array at these leading indices; nothing is read."""
        return StoredArray(self._store[index], self._weights) if index else self


def save(weights: epath.Path, params: dict[str, Any]) -> None:
    """Writes nested dicts of LazyArray."""
    lazy_array.register()
    with _checkpointer() as checkpointer:
        checkpointer.save(weights, params, force=True)


def read(weights: epath.Path) -> dict[str, Any]:
    """All arrays as numpy arrays, whatever devices they were saved from.

    Raises:
      FileError: they cannot be read.
      ResourceError: they do not fit into memory.
    """
    with _read_errors(weights), _checkpointer() as checkpointer:
        described = checkpointer.metadata(weights).item_metadata.tree
        _check_memory(weights, jax.tree.leaves(described))
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), described)
        return checkpointer.restore(weights, restore_args=as_numpy)


def open_arrays(weights: epath.Path) -> dict[str, Any]:
    """All arrays as StoredArrays.

    Raises:
      FileError: they cannot be opened.
    """
    scheme, _, path = str(weights).rpartition("://")
    # In a URL, "#", "%" and "?" must be escaped.
    base = f"{scheme or 'file'}://{urllib.parse.quote(path)}/"
    with _read_errors(weights), _checkpointer() as checkpointer:
        names = traverse_util.flatten_dict(checkpointer.metadata(weights).item_metadata.tree)
        specs = [
            {
                "driver": "zarr",
                "kvstore": {"driver": "ocdbt", "base": base, "path": f"{'.'.join(name)}/"},
                "open": True,
            }
            for name in names
        ]
        context = tensorstore.Context()
        opening = [tensorstore.open(spec, context=context) for spec in specs]
        arrays = [StoredArray(store.result(), weights) for store in opening]
        return traverse_util.unflatten_dict(dict(zip(names, arrays, strict=True)))


def unstack_layers(
    path: tuple[str, ...], array: StoredArray
) -> Iterator[tuple[tuple[str, ...], StoredArray]]:
    """The layers of a stacked array, with the paths that `nn.stack.unstack` gives them."""
    for index in np.ndindex(*array.shape[: stacked_axes(path)]):
        numbers = iter(index)
        layer_path = tuple(f"{name}_{next(numbers)}" if name in STACKED else name for name in path)
        yield layer_path, array.part(index)


def _checkpointer() -> ocp.Checkpointer:
    """A checkpointer of this process alone.

    In a job of several processes, only the first one writes a model folder, and none waits for
    another.
    """
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process_{process}",
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _check_memory(weights: epath.Path, arrays: Sequence[Any]) -> None:
    """Refuses a damaged checkpoint whose metadata claim terabytes."""
    needed = sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in arrays)
    available = hardware.host_memory()
    if available is not None and needed > available:
        raise ResourceError(
            f"the weights in {weights} take {needed / 2**30:,.1f} GiB,"
            f" and this machine has {available / 2**30:,.1f} GiB left"
        )


@contextlib.contextmanager
def _read_errors(weights: epath.Path) -> Iterator[None]:
    """Turns errors of Orbax and TensorStore, which have many types, into a FileError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if missing := hardware.missing_devices():  # Orbax asks JAX for its devices.
            raise ResourceError(missing) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileError(
            f"the weights in {weights} cannot be read ({reason}); fetch or write the folder again"
        ) from error
