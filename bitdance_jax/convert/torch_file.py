"""Torch's zip files (torch.save since PyTorch 1.6), read without PyTorch; tensors are read one by one, when they are needed."""

import os
import re
import zipfile
from typing import Any

import numpy as np

from bitdance_jax.convert import torch_pickle
from bitdance_jax.convert.torch_pickle import Tensor
from bitdance_jax.errors import UserError, short
from bitdance_jax.io import readers
from bitdance_jax.io.lazy_array import LazyArray


LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The pickled number that opens a file of torch.save before PyTorch 1.6; before 0.2 it wrote tar files."""


def load(path: str | os.PathLike[str]) -> Any:
    """The object in the file: dicts, lists, tuples, scalars, strings, and a `LazyArray` for every tensor. No code in it is run.

    Raises:
      UserError: not such a file, cut short, hostile, or with tensors that lie outside their storage. Damage of a tensor's bytes is found by
        their CRC-32 when it is read.
    """
    readers.check_file(path)
    try:
        return _File(path).load()
    except UserError as error:
        raise type(error)(f"{os.fspath(path)} cannot be read: {error}") from None


class _File:
    def __init__(self, path: str | os.PathLike[str]) -> None:
        _check_format(path)
        self.path = path
        self.size = os.path.getsize(path)
        try:
            self.zip = zipfile.ZipFile(path)
        except readers.ZIP_ERRORS as error:
            raise UserError(f"it is cut short or damaged ({error}); fetch it again") from error
        self.records = {info.filename: info for info in self.zip.infolist()}
        self.folder = self._folder()

    def load(self) -> Any:
        if (
            self.folder + "byteorder" in self.records
            and self._small("byteorder").strip() != b"little"
        ):
            raise UserError(
                "it was written on a big-endian machine; save it again on a little-endian one"
            )
        content = torch_pickle.load(self._small("data.pkl"))
        return self._resolve(content)

    def _folder(self) -> str:
        if len(self.records) < len(self.zip.infolist()):
            raise UserError("it has two records of one name")
        unsafe = [
            name
            for name in self.records
            if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name)
        ]
        if unsafe:
            raise UserError(
                f"it has a record {unsafe[0]!r} that points outside; the file may be hostile"
            )
        pickles = [name for name in self.records if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise UserError("it is a zip file, and not one of torch.save: it has no data.pkl")
        return pickles[0].removesuffix("data.pkl")

    def _record(self, name: str) -> zipfile.ZipInfo:
        info = self.records.get(self.folder + name)
        if info is None:
            raise UserError(f"its record {name} is missing")
        if (
            info.compress_type != zipfile.ZIP_STORED
            or info.flag_bits & 1
            or info.file_size != info.compress_size
        ):
            raise UserError(
                f"its record {name} is compressed or encrypted, which torch.save does not do"
            )
        if info.header_offset + info.file_size > self.size:
            raise UserError(
                f"its record {name} reaches past its end: it is cut short or damaged; fetch it again"
            )
        return info

    def _small(self, name: str) -> bytes:
        """A record that holds no tensor."""
        if self._record(name).file_size > torch_pickle.MAX_BYTES:
            raise UserError(
                f"its record {name} is larger than {torch_pickle.MAX_BYTES:,} bytes; the file may be hostile"
            )
        return self._bytes(name)

    def _bytes(self, name: str) -> bytes:
        try:
            return self.zip.read(self._record(name))
        except readers.ZIP_ERRORS as error:
            raise UserError(
                f"its record {name} is damaged ({error}); fetch the file again"
            ) from error

    def _resolve(self, content: Any) -> Any:
        """The pickle's object with arrays for tensors. Without recursion: a hostile file may nest deeply, or in circles."""
        root = [content]
        seen: dict[
            int, tuple[Any, Any]
        ] = {}  # the object, kept so that its id stays its own, and what replaces it
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
                    todo += [
                        (container, inner)
                        for inner in (value if isinstance(value, dict) else range(len(value)))
                    ]
                parent[key] = seen[id(value)][1]
        return root[0]

    def _array(self, tensor: Tensor) -> LazyArray:
        tensor.check()
        storage = tensor.storage
        if not re.fullmatch(r"[0-9]{1,20}", storage.key):
            raise UserError(
                f"a tensor's storage has the name {short(storage.key)}, which is no number; the file may be hostile"
            )
        name = f"data/{storage.key}"
        if self._record(name).file_size != storage.size * storage.dtype.itemsize:
            raise UserError(f"its record {name} is not as long as its tensor says")

        def read() -> np.ndarray:
            try:
                flat = np.frombuffer(self._bytes(name), storage.dtype)
            except UserError as error:
                raise UserError(f"{os.fspath(self.path)} cannot be read: {error}") from error
            return tensor.view(flat)

        return LazyArray(tuple(tensor.shape), storage.dtype, read)


def _check_format(path: str | os.PathLike[str]) -> None:
    """Tells the formats that torch.save wrote before PyTorch 1.6 from other files that are no zip files."""
    with open(path, "rb") as file:
        start = file.read(512)
    if start.startswith(LEGACY_MAGIC) or start[257:262] == b"ustar":
        raise UserError(
            "it has the legacy format of PyTorch before 1.6; load it and save it again with torch.save in a current PyTorch"
        )
    if not start.startswith(b"PK"):
        raise UserError("it is neither a file of torch.save nor a .safetensors file")
