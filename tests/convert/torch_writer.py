"""Writes files like those of torch.save without PyTorch, hostile ones too.

They are zip files of uncompressed records, one of them a pickle.
"""

import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "bfloat16": "BFloat16Storage",
    "int32": "IntStorage",
    "int64": "LongStorage",
}


class Call(NamedTuple):
    """A call of a global (the opcode REDUCE), and its state (BUILD)."""

    name: str
    arguments: tuple
    state: Any = None


class Tensor(NamedTuple):
    """A reference to a storage, with any sizes."""

    dtype: str
    key: str
    size: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def save(path: Path, value: Any, *, skip: tuple[str, ...] = ()) -> Path:
    """Writes dicts, tuples, lists, scalars, strings, `Call`s, and numpy arrays (a storage each).

    The records in `skip` are omitted.
    """
    arrays: list[np.ndarray] = []
    data = pickle(value, arrays)
    records = {"data.pkl": data, "byteorder": b"little"} | {
        f"data/{i}": array.tobytes() for i, array in enumerate(arrays)
    }
    return write_zip(
        path,
        {f"{path.stem}/{name}": content for name, content in records.items() if name not in skip},
    )


def write_zip(path: Path, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in records.items():
            file.writestr(name, content)
    return path


def pickle(value: Any, arrays: list[np.ndarray] | None = None) -> bytes:
    """A pickle of protocol 2, as PyTorch writes it. Arrays are appended to `arrays`."""
    return b"\x80\x02" + _encode(value, [] if arrays is None else arrays) + b"."


def tensor_of(array: np.ndarray, key: int) -> Tensor:
    """The contiguous tensor that fills the storage."""
    strides = tuple(int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim))
    return Tensor(array.dtype.name, str(key), array.size, 0, array.shape, strides)


def _encode(value: Any, arrays: list[np.ndarray]) -> bytes:
    if isinstance(value, Call):
        state = b"" if value.state is None else _encode(value.state, arrays) + b"b"
        return _global(value.name) + _encode(value.arguments, arrays) + b"R" + state
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return _encode(tensor_of(value, len(arrays) - 1), arrays)
    if isinstance(value, Tensor):
        kind = _global(f"torch.{STORAGES[value.dtype]}")
        persistent = (
            b"("
            + _encode("storage", [])
            + kind
            + b"".join(_encode(x, []) for x in (value.key, "cpu", value.size))
            + b"tQ"
        )
        rest = b"".join(
            _encode(x, [])
            for x in (
                value.offset,
                value.shape,
                value.stride,
                False,
                Call("collections.OrderedDict", ()),
            )
        )
        return _global("torch._utils._rebuild_tensor_v2") + b"(" + persistent + rest + b"tR"
    if isinstance(value, dict):
        return (
            b"}("
            + b"".join(_encode(key, arrays) + _encode(item, arrays) for key, item in value.items())
            + b"u"
        )
    if isinstance(value, list | tuple):
        items = b"".join(_encode(item, arrays) for item in value)
        return b"](" + items + b"e" if isinstance(value, list) else b"(" + items + b"t"
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(content)]) + content
    return b"G" + struct.pack(">d", value)


def _global(name: str) -> bytes:
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode()
