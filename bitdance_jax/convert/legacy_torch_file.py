"""Reads files of torch.save before PyTorch 1.6 without PyTorch.

The published weights of FID's Inception-v3 are such a file. It has five pickles (a magic number, a
version, the machine, the object, the keys of its storages) and then, in the order of the keys, each
storage: its number of elements as an int64, and the elements.
"""

import io
import os
from typing import IO, Any

import numpy as np

from bitdance_jax.convert import torch_pickle
from bitdance_jax.convert.torch_tensor import Storage, Tensor
from bitdance_jax.errors import FileError, short
from bitdance_jax.io import readers
from bitdance_jax.io.lazy_array import LazyArray


MAGIC = 0x1950A86A20F9469CFC6C
START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The pickle of the magic number."""
VERSION = 1001


def is_legacy(path: str | os.PathLike[str]) -> bool:
    """Whether the file has this format."""
    with open(path, "rb") as file:
        return file.read(len(START)) == START


def load(path: str | os.PathLike[str]) -> dict[str, LazyArray]:
    """The tensors of the state dict in the file. No code in it is run.

    Raises:
      FileError: not such a file, truncated, hostile, not a flat state dict, or tensors outside
        their storage.
    """
    readers.check_file(path)
    try:
        with open(path, "rb") as file:
            start = io.BytesIO(file.read(torch_pickle.MAX_BYTES))
            magic, version, machine, content, keys = (
                torch_pickle.load(start, _zip_reference) for _ in range(5)
            )
            little_endian = isinstance(machine, dict) and machine.get("little_endian") is True
            if magic != MAGIC or version != VERSION or not little_endian:
                raise FileError("it is not a little-endian file of torch.save before PyTorch 1.6")
            if not isinstance(content, dict) or not _is_list_of_names(keys):
                raise FileError("it does not hold a state dict")
            tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
            storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
            file.seek(start.tell())
            starts = _storage_starts(file, keys, storages)
        return {name: _lazy_array(path, tensor, starts) for name, tensor in tensors.items()}
    except FileError as error:
        raise type(error)(f"{os.fspath(path)} cannot be read: {error}", path) from None


def _is_list_of_names(keys: Any) -> bool:
    return isinstance(keys, list) and all(isinstance(key, str) for key in keys)


def _zip_reference(reference: Any) -> Any:
    """A storage's persistent id without its last part, as in zip files."""
    *storage, view = reference
    if view is not None:
        raise FileError(
            "a storage is a view of another one; save the file again in a current PyTorch"
        )
    return tuple(storage)


def _storage_starts(
    file: IO[bytes], keys: list[Any], storages: dict[str, Storage]
) -> dict[str, int]:
    """The position of each storage's elements in the file, whose first storage is the next."""
    starts = {}
    position = file.tell()
    end = os.fstat(file.fileno()).st_size
    for key in dict.fromkeys(keys):
        if key not in storages:
            raise FileError(f"it has a storage {short(key)} without a tensor")
        file.seek(position)
        size = int.from_bytes(file.read(8), "little", signed=True)
        if size != storages[key].size:
            raise FileError(
                f"its storage {key} has {size} elements instead of {storages[key].size}"
            )
        starts[key] = position + 8
        position += 8 + size * storages[key].dtype.itemsize
        if position > end:
            raise FileError(
                f"it is truncated: {end} bytes instead of at least {position}; fetch it again"
            )
    return starts


def _lazy_array(path: str | os.PathLike[str], tensor: Tensor, starts: dict[str, int]) -> LazyArray:
    tensor.check()
    dtype, key, size = tensor.storage
    if key not in starts:
        raise FileError(f"a tensor's storage {key} is missing")

    def read() -> np.ndarray:
        elements = np.fromfile(path, dtype, size, offset=starts[key])
        if elements.size != size:
            raise FileError(f"{os.fspath(path)} cannot be read: it was truncated meanwhile", path)
        return tensor.view(elements)

    return LazyArray(tuple(tensor.shape), dtype, read)
