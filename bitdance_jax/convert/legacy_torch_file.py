"""Files of torch.save before PyTorch 1.6, read without PyTorch: the published FID Inception-v3 weights are one.

Such a file is five pickles (a magic number, a version, the machine, the object, the keys of its storages), then each storage in the order
of the keys: its number of elements as an int64, and the elements.
"""

import io
import os
from typing import IO, Any

import numpy as np

from bitdance_jax.convert import torch_pickle
from bitdance_jax.convert.torch_pickle import Storage, Tensor
from bitdance_jax.errors import UserError, short
from bitdance_jax.io import readers
from bitdance_jax.io.lazy_array import LazyArray


MAGIC = 0x1950A86A20F9469CFC6C
START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The magic number's pickle."""
VERSION = 1001


def is_legacy(path: str | os.PathLike[str]) -> bool:
    """Whether the file has this format."""
    with open(path, "rb") as file:
        return file.read(len(START)) == START


def load(path: str | os.PathLike[str]) -> dict[str, LazyArray]:
    """The state dict in the file: a `LazyArray` for each tensor; what is no tensor is left out. No code in it is run.

    Raises:
      UserError: not such a file, cut short, hostile, not a flat state dict, or tensors that lie outside their storage.
    """
    readers.check_file(path)
    try:
        with open(path, "rb") as file:
            start = io.BytesIO(file.read(torch_pickle.MAX_BYTES))
            magic, version, machine, content, keys = (
                torch_pickle.load(start, _zip_reference) for _ in range(5)
            )
            if (
                magic != MAGIC
                or version != VERSION
                or not isinstance(machine, dict)
                or machine.get("little_endian") is not True
            ):
                raise UserError("it is not a little-endian file of torch.save before PyTorch 1.6")
            if (
                not isinstance(content, dict)
                or not isinstance(keys, list)
                or not all(isinstance(key, str) for key in keys)
            ):
                raise UserError("it does not hold a state dict")
            tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
            file.seek(start.tell())
            starts = _storage_starts(
                file, keys, {tensor.storage.key: tensor.storage for tensor in tensors.values()}
            )
        return {name: _lazy(path, tensor, starts) for name, tensor in tensors.items()}
    except UserError as error:
        raise type(error)(f"{os.fspath(path)} cannot be read: {error}") from None


def _zip_reference(reference: Any) -> Any:
    *storage, view = reference
    if view is not None:
        raise UserError(
            "a storage is a view of another one; save the file again in a current PyTorch"
        )
    return tuple(storage)


def _storage_starts(
    file: IO[bytes], keys: list[Any], storages: dict[str, Storage]
) -> dict[str, int]:
    """Where each storage's elements begin in the file, which is read from here to its end without them."""
    starts = {}
    position, end = file.tell(), os.fstat(file.fileno()).st_size
    for key in dict.fromkeys(keys):
        if key not in storages:
            raise UserError(f"it has a storage {short(key)} that belongs to no tensor")
        file.seek(position)
        size = int.from_bytes(file.read(8), "little", signed=True)
        if size != storages[key].size:
            raise UserError(
                f"its storage {key} has {size} elements, and its tensor says {storages[key].size}"
            )
        starts[key] = position + 8
        position += 8 + size * storages[key].dtype.itemsize
        if position > end:
            raise UserError(
                f"it is cut short: {end} bytes instead of at least {position}; fetch it again"
            )
    return starts


def _lazy(path: str | os.PathLike[str], tensor: Tensor, starts: dict[str, int]) -> LazyArray:
    tensor.check()
    dtype, key, size = tensor.storage
    if key not in starts:
        raise UserError(f"a tensor's storage {key} is missing")

    def read() -> np.ndarray:
        numbers = np.fromfile(path, dtype, size, offset=starts[key])
        if numbers.size != size:
            raise UserError(f"{os.fspath(path)} cannot be read; it was cut short meanwhile")
        return tensor.view(numbers)

    return LazyArray(tuple(tensor.shape), dtype, read)
