"""Reads zip files of torch.save (since PyTorch 1.6) without PyTorch, one tensor at a time."""

import os
import re
import zipfile
from typing import Any

import numpy as np

from bitdance_jax.convert import torch_pickle
from bitdance_jax.convert.legacy_torch_file import START as LEGACY_START
from bitdance_jax.convert.torch_tensor import Tensor
from bitdance_jax.errors import FileError, short
from bitdance_jax.io import readers
from bitdance_jax.io.lazy_array import LazyArray


def load(path: str | os.PathLike[str]) -> Any:
    """The object in the file: dicts, lists, scalars, strings, and a `LazyArray` for every tensor.

    No code in it is run.

    Raises:
      FileError: not such a file, truncated, hostile, or with tensors outside their storage. Reading
        a tensor compares its CRC-32 and raises a FileError if it is damaged.
    """
    readers.check_file(path)
    try:
        return _File(path).load()
    except FileError as error:
        raise type(error)(f"{os.fspath(path)} cannot be read: {error}", path) from None


class _File:
    """An open zip file, with its records by name."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        _check_format(path)
        self.path = path
        self.size = os.path.getsize(path)
        try:
            self.zip = zipfile.ZipFile(path)
        except readers.ZIP_ERRORS as error:
            raise FileError(f"it is truncated or damaged ({error}); fetch it again") from error
        self.records = {info.filename: info for info in self.zip.infolist()}
        self.folder = self._folder()

    def load(self) -> Any:
        has_byteorder = self.folder + "byteorder" in self.records
        if has_byteorder and self._read_small("byteorder").strip() != b"little":
            raise FileError(
                "it was written on a big-endian machine; save it again on a little-endian one"
            )
        content = torch_pickle.load(self._read_small("data.pkl"))
        return self._resolve(content)

    def _folder(self) -> str:
        """The folder of all records."""
        if len(self.records) < len(self.zip.infolist()):
            raise FileError("it has two records with the same name")
        unsafe = [
            name
            for name in self.records
            if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name)
        ]
        if unsafe:
            raise FileError(
                f"it has a record {unsafe[0]!r} outside of its folder; the file may be hostile"
            )
        pickles = [name for name in self.records if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise FileError("it is a zip file, but not one of torch.save: it has no data.pkl")
        return pickles[0].removesuffix("data.pkl")

    def _record(self, name: str) -> zipfile.ZipInfo:
        info = self.records.get(self.folder + name)
        if info is None:
            raise FileError(f"its record {name} is missing")
        if (
            info.compress_type != zipfile.ZIP_STORED
            or info.flag_bits & 1
            or info.file_size != info.compress_size
        ):
            raise FileError(
                f"its record {name} is compressed or encrypted, which torch.save does not do"
            )
        if info.header_offset + info.file_size > self.size:
            raise FileError(
                f"its record {name} ends outside of it: it is truncated or damaged; fetch it again"
            )
        return info

    def _read_small(self, name: str) -> bytes:
        """The content of a record that is not a tensor."""
        if self._record(name).file_size > torch_pickle.MAX_BYTES:
            raise FileError(
                f"its record {name} is larger than {torch_pickle.MAX_BYTES:,} bytes;"
                " the file may be hostile"
            )
        return self._read(name)

    def _read(self, name: str) -> bytes:
        try:
            return self.zip.read(self._record(name))
        except readers.ZIP_ERRORS as error:
            raise FileError(
                f"its record {name} is damaged ({error}); fetch the file again"
            ) from error

    def _resolve(self, content: Any) -> Any:
        """The pickle's object with arrays for tensors, and lists for tuples.

        It does not recurse, because a hostile file may nest deeply or in circles.
        """
        root = [content]
        # By id, each container and its replacement. The reference prevents that the id is reused.
        seen: dict[int, tuple[Any, Any]] = {}
        todo: list[tuple[Any, Any]] = [(root, 0)]
        while todo:
            parent, key = todo.pop()
            value = parent[key]
            if isinstance(value, Tensor):
                parent[key] = self._array(value)
            elif isinstance(value, dict | list | tuple):
                if id(value) not in seen:
                    container = list(value) if isinstance(value, tuple) else value
                    seen[id(value)] = value, container
                    inner = value if isinstance(value, dict) else range(len(value))
                    todo += [(container, name) for name in inner]
                parent[key] = seen[id(value)][1]
        return root[0]

    def _array(self, tensor: Tensor) -> LazyArray:
        tensor.check()
        storage = tensor.storage
        if not re.fullmatch(r"[0-9]{1,20}", storage.key):
            raise FileError(
                f"a tensor's storage has the name {short(storage.key)}, which is not a number;"
                " the file may be hostile"
            )
        name = f"data/{storage.key}"
        if self._record(name).file_size != storage.size * storage.dtype.itemsize:
            raise FileError(f"its record {name} has another size than its storage")

        def read() -> np.ndarray:
            try:
                elements = np.frombuffer(self._read(name), storage.dtype)
            except FileError as error:
                path = os.fspath(self.path)
                raise FileError(f"{path} cannot be read: {error}", self.path) from error
            return tensor.view(elements)

        return LazyArray(tuple(tensor.shape), storage.dtype, read)


def _check_format(path: str | os.PathLike[str]) -> None:
    """Refuses files that are not zip files. Before PyTorch 0.2, torch.save wrote tar files."""
    with open(path, "rb") as file:
        start = file.read(512)
    if start.startswith(LEGACY_START) or start[257:262] == b"ustar":
        raise FileError(
            "it has the legacy format of PyTorch before 1.6;"
            " load it and save it again with torch.save in a current PyTorch"
        )
    if not start.startswith(b"PK"):
        raise FileError("it is neither a file of torch.save nor a .safetensors file")
