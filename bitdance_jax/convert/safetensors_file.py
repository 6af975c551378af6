"""Reads and writes .safetensors files, single or in shards, one tensor at a time."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from bitdance_jax.errors import FileError, short
from bitdance_jax.io import readers
from bitdance_jax.io.lazy_array import LazyArray


FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
INTEGERS = {
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
DTYPES = FLOATS | INTEGERS

Tensors = dict[str, LazyArray]


class SafetensorsFile(NamedTuple):
    """The tensors and the metadata of a file."""

    tensors: Tensors
    metadata: dict[str, str]


@dataclass(frozen=True)
class Index:
    """The shard of each key."""

    weight_map: dict[str, str]


def is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(9)
    return (
        len(start) == 9
        and start[8:] == b"{"
        and int.from_bytes(start[:8], "little") <= path.stat().st_size
    )


def load(path: Path) -> SafetensorsFile:
    """Opens one file.

    Raises:
      FileError: it is truncated or damaged, has duplicate keys, or unexpected dtypes.
    """
    readers.check_file(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > readers.MAX_LIST_BYTES:
                raise FileError(
                    f"{path} cannot be read: it is damaged, its header has {length:,} bytes", path
                )
            text = file.read(length)
        # Checks every entry and the length of the file.
        with safetensors.safe_open(path, framework="np"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        line = f"{path} cannot be read: it is truncated or damaged ({error})"
        raise FileError(line, path) from error
    headers = readers.decode_json(
        text, dict[str, dict[str, Any]], where=str(path), fix="fetch it again", unique=True
    )
    metadata = headers.pop("__metadata__", {})
    odd = [
        f"{key} is {short(header['dtype'])}"
        for key, header in headers.items()
        if header["dtype"] not in DTYPES
    ]
    if odd:
        raise FileError(f"{path} has dtypes that no released model has: {', '.join(odd)}", path)
    return SafetensorsFile(
        {key: _tensor(path, 8 + length, header) for key, header in headers.items()}, metadata
    )


def load_shards(folder: Path, stem: str) -> SafetensorsFile:
    """Opens `{stem}.safetensors.index.json` and the files that it names, or `{stem}.safetensors`.

    Raises:
      FileError: a file is missing, a key is in two files, or see `load`.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return load(folder / f"{stem}.safetensors")
    content = readers.read_json(
        index,
        Index,
        limit=readers.MAX_LIST_BYTES,
        fix="it must have a weight_map from keys to files; fetch it again",
    )
    names = sorted(set(content.weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside or not names:
        named = outside[0] if outside else "no files"
        raise FileError(f"{index} is damaged: it names {named}; fetch it again", index)
    if missing := [name for name in names if not os.path.isfile(folder / name)]:
        raise FileError(
            f"{index} names files that are missing in {folder}: {', '.join(missing)}", index
        )
    tensors: Tensors = {}
    metadata: dict[str, str] = {}
    for name in names:
        shard = load(folder / name)
        if duplicates := sorted(tensors.keys() & shard.tensors.keys()):
            raise FileError(
                f"{folder / name} has keys of another shard: {', '.join(duplicates)}", folder / name
            )
        tensors |= shard.tensors
        metadata |= shard.metadata
    return SafetensorsFile(tensors, metadata)


def save(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Writes one file."""
    names = {np.dtype(kind): name for name, kind in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, array in tensors.items():
        header[key] = {
            "dtype": names[array.dtype],
            "shape": array.shape,
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # The values begin at a multiple of 8.
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            values = np.ascontiguousarray(array.read())
            # `tofile` does not say why it fails.
            file.write(values.reshape(-1).view(np.uint8).data)


def save_shards(folder: Path, stem: str, tensors: Tensors, shard_bytes: int) -> None:
    """Writes `{stem}-0000N-of-0000M.safetensors` and their index.

    A shard has at most `shard_bytes`, or one tensor.
    """
    shards: list[Tensors] = [{}]
    for key, array in tensors.items():
        size = sum(other.nbytes for other in shards[-1].values())
        if shards[-1] and size + array.nbytes > shard_bytes:
            shards.append({})
        shards[-1][key] = array
    names = [f"{stem}-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save(folder / name, shard, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in tensors.values())},
        "weight_map": {
            key: name for name, shard in zip(names, shards, strict=True) for key in shard
        },
    }
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _tensor(path: Path, start: int, header: dict[str, Any]) -> LazyArray:
    dtype = np.dtype(DTYPES[header["dtype"]])
    shape = tuple(header["shape"])
    offset = start + header["data_offsets"][0]

    def read() -> np.ndarray:
        size = int(np.prod(shape, dtype=np.int64))
        values = np.fromfile(path, dtype, count=size, offset=offset)
        if values.size != size:
            raise FileError(f"{path} cannot be read: it was truncated meanwhile", path)
        return values.reshape(shape)

    return LazyArray(shape, dtype, read)
