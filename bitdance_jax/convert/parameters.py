"""State dicts of the release to our stacked parameters and back, one array at a time."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bitdance_jax.convert import keys
from bitdance_jax.io.lazy_array import LazyArray
from bitdance_jax.nn.stack import STACKED, stacked_axes


Tensors = dict[str, LazyArray]
Params = dict[str, Any]


def problems(
    tensors: Tensors, abstract: Params, table: keys.Table, *, prefix: str = ""
) -> list[str]:
    """Lists unknown, missing and misshapen keys, and integers where floats are expected.

    Args:
      tensors: the state dict.
      abstract: our stacked parameters.
      table: the key table.
      prefix: put before each key in the messages.
    """
    expected = release_shapes(abstract, table)
    unknown = [f"unknown key {prefix}{key}" for key in tensors if key not in expected]
    missing = [f"missing key {prefix}{key}" for key in expected if key not in tensors]
    misshapen = [
        f"{prefix}{key} has the shape {list(tensors[key].shape)}, the model's is {list(shape)}"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != shape
    ]
    integers = [
        f"{prefix}{key} has numbers of the type {tensors[key].dtype}"
        for key in expected
        if key in tensors and not jnp.issubdtype(tensors[key].dtype, jnp.floating)
    ]
    return unknown + missing + misshapen + integers


def release_shapes(abstract: Params, table: keys.Table) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the state dict of a model with these stacked parameters."""
    shapes = {}
    for path, leaf in traverse_util.flatten_dict(abstract).items():
        axes = stacked_axes(path)
        one_byte = np.broadcast_to(np.int8(0), leaf.shape[axes:])
        for _, layer in layers(path, leaf.shape):
            key, row = keys.release_key(layer, table)
            shapes[key] = keys.to_release(one_byte, row, path[-1]).shape
    return shapes


def from_release(tensors: Tensors, abstract: Params, table: keys.Table) -> Params:
    """Our stacked parameters, of which one layer is read at a time.

    The tensors must have no `problems`.
    """
    flat = traverse_util.flatten_dict(abstract)
    return traverse_util.unflatten_dict(
        {path: _stacked(tensors, path, leaf.shape, table) for path, leaf in flat.items()}
    )


def to_release(params: Params, table: keys.Table) -> dict[str, LazyArray]:
    """The inverse of `from_release`, for arrays or `orbax_weights.StoredArray`s."""
    state = {}
    for path, array in traverse_util.flatten_dict(params).items():
        one_byte = np.broadcast_to(np.int8(0), array.shape[stacked_axes(path) :])
        for index, layer in layers(path, array.shape):
            key, row = keys.release_key(layer, table)
            shape = keys.to_release(one_byte, row, path[-1]).shape
            read = functools.partial(_read_released, array, index, row, path[-1])
            state[key] = LazyArray(shape, array.dtype, read)
    return state


def _read_released(array: Any, index: tuple[int, ...], row: keys.Row, leaf: str) -> np.ndarray:
    return keys.to_release(array[index], row, leaf)


def num_bytes(params: Params) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def _stacked(
    tensors: Tensors, path: tuple[str, ...], shape: tuple[int, ...], table: keys.Table
) -> LazyArray:
    rows = {index: keys.release_key(layer, table) for index, layer in layers(path, shape)}
    dtype = np.result_type(*{tensors[key].dtype for key, _ in rows.values()})

    def read(*index: int) -> np.ndarray:
        key, row = rows[index]
        return keys.to_ours(tensors[key].read(), row, path[-1]).astype(dtype, copy=False)

    return LazyArray(shape, dtype, read, stacked_axes(path))


def layers(path: tuple[str, ...], shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    """The index of every layer in a stacked parameter, and its path when unrolled.

    A parameter that is not stacked has the one index ().
    """
    for index in np.ndindex(*shape[: stacked_axes(path)]):
        numbers = iter(index)
        parts = [f"{part}_{next(numbers)}" if part in STACKED else part for part in path]
        yield index, "/".join(parts)
