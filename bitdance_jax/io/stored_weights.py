"""The weights of a model folder: an Orbax checkpoint of one process, read whole or array by array.

Folders are absolute, on a local disk or under gs://.
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

from bitdance_jax.errors import UserError
from bitdance_jax.io import lazy
from bitdance_jax.nn.stack import STACKED, stacked_axes
from bitdance_jax.perf import hardware


class StoredArray:
    """An array on the disk: what is indexed is read, and nothing else. `jax.make_array_from_callback` makes a sharded array of one.

    Attributes:
      shape, dtype: its own.
    """

    def __init__(self, store: tensorstore.TensorStore, weights: epath.Path) -> None:
        self._store, self._weights = store, weights
        self.shape: tuple[int, ...] = tuple(store.shape)
        self.dtype = np.dtype(store.dtype.numpy_dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        """The values at integers from 0 up, slices or `...`, as of a numpy array; a UserError if they are damaged."""
        part = self._store[index]
        with _readable(self._weights):
            return np.asarray(part.read().result())

    def part(self, index: tuple[int, ...]) -> "StoredArray":
        """The array at these first indices, still unread."""
        return StoredArray(self._store[index], self._weights) if index else self


def save(weights: epath.Path, params: dict[str, Any]) -> None:
    """Writes nested dicts of `lazy.LazyArray`."""
    lazy.register()
    with _checkpointer() as checkpointer:
        checkpointer.save(weights, params, force=True)


def read(weights: epath.Path) -> dict[str, Any]:
    """The arrays of a checkpoint as numpy ones: independent of the devices that they were saved from."""
    with _readable(weights), _checkpointer() as checkpointer:
        described = checkpointer.metadata(weights).item_metadata.tree
        _check_memory(weights, jax.tree.leaves(described))
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), described)
        return checkpointer.restore(weights, restore_args=as_numpy)


def open_arrays(weights: epath.Path) -> dict[str, Any]:
    """The arrays of a checkpoint, as StoredArrays."""
    scheme, _, place = str(weights).rpartition("://")
    # A URL, in which "#", "%" and "?" would be more than letters.
    base = f"{scheme or 'file'}://{urllib.parse.quote(place)}/"
    with _readable(weights), _checkpointer() as checkpointer:
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
        stored = [StoredArray(store.result(), weights) for store in opening]
        return traverse_util.unflatten_dict(dict(zip(names, stored, strict=True)))


def layers(
    path: tuple[str, ...], array: StoredArray
) -> Iterator[tuple[tuple[str, ...], StoredArray]]:
    """A stacked array layer by layer, named as `transformer.stack.unstack` names them."""
    for index in np.ndindex(*array.shape[: stacked_axes(path)]):
        numbers = iter(index)
        yield (
            tuple(f"{name}_{next(numbers)}" if name in STACKED else name for name in path),
            array.part(index),
        )


def _checkpointer() -> ocp.Checkpointer:
    """Orbax's, for this process alone: in a job of several only the first one writes a model folder, and none waits for another."""
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process_{this}"
    )
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone
    )


def _check_memory(weights: epath.Path, arrays: Sequence[Any]) -> None:
    """A few bytes on the disk may say that they are terabytes."""
    needed = sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in arrays)
    available = hardware.host_memory()
    if available is not None and needed > available:
        raise UserError(
            f"the weights in {weights} take {needed / 2**30:,.1f} GiB, and this machine has {available / 2**30:,.1f} GiB left"
        )


@contextlib.contextmanager
def _readable(weights: epath.Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (
        Exception
    ) as error:  # Orbax and TensorStore raise many types for a checkpoint that they cannot read.
        if missing := hardware.missing_devices():  # Orbax asks JAX for them.
            raise UserError(missing) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the weights in {weights} cannot be read ({reason}); fetch or write the folder again"
        ) from error
