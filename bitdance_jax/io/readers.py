"""Reads files that may be damaged or hostile: regular files of bounded size, and typed JSON.

Whatever is in a file, the result is its content or a FileError of one line.
"""

import codecs
import json
import os
import re
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
from etils import epath

from bitdance_jax.errors import FileError
from bitdance_jax.io.paths import GCS_EXTRA


PathLike = str | os.PathLike[str]

MAX_BYTES = 8 * 2**20
"""Size limit of a config, an index or a manifest. Decoded JSON takes up to 30 times its size."""

MAX_LIST_BYTES = 64 * 2**20
"""Size limit of files with long lists: vocabularies, prompts."""

MAX_DEPTH = 100
"""Nesting limit of JSON, because functions that traverse it are recursive."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

REFETCH = "fetch or write it again"

ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    OverflowError,
    RuntimeError,  # encrypted; includes NotImplementedError, for a feature that Python lacks
    ValueError,  # names that cannot be decoded
)
"""What zipfile raises for a file that it cannot read."""


class MissingFile(FileError):
    """There is no such file."""


@contextmanager
def reading(path: PathLike) -> Iterator[None]:
    """Raises errors of the operating system about `path`, local or gs://, as FileErrors."""
    try:
        yield
    except FileNotFoundError as error:
        name = os.fspath(error.filename or path)
        raise MissingFile(f"there is no file {name}", name) from error
    except OSError as error:
        name = os.fspath(error.filename or path)
        raise FileError(f"cannot read {name}: {error.strerror or error}", name) from error
    except ImportError as error:
        raise FileError(f"{os.fspath(path)} needs {GCS_EXTRA}", path) from error


def check_file(path: PathLike) -> epath.Path:
    """The path, local or gs://, of a regular file that can be read.

    Raises:
      MissingFile: the file does not exist.
      FileError: it is a folder, a pipe, a device or a pointer of Git LFS; there is no permission;
        or no file can have this name.
    """
    file = epath.Path(path)
    try:
        if "://" not in str(file) and not stat.S_ISREG(os.stat(file).st_mode):
            raise FileError(f"{file} is not a file, but a folder, a pipe or a device", file)
        with file.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
    except FileError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFile(f"there is no file {file}", file) from error
    except OSError as error:
        raise FileError(f"{file} cannot be read ({error.strerror or error})", file) from error
    except ValueError as error:  # of os.stat, for NUL characters
        raise FileError(f"{str(file)!r} cannot be the name of a file") from error
    if start == LFS_POINTER:
        raise FileError(
            f"{file} is a pointer of Git LFS and not the file itself; fetch it with: git lfs pull",
            file,
        )
    return file


def read_bytes(path: PathLike, limit: int = MAX_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
      FileError: see `check_file`; or the file has more than `limit` bytes.
    """
    file = check_file(path)
    try:
        with file.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise FileError(f"{file} cannot be read ({error.strerror or error})", file) from error
    if len(data) > limit:
        raise FileError(f"{file} is larger than such files are: more than {limit:,} bytes", file)
    return data


def read_text(path: PathLike, limit: int = MAX_BYTES) -> str:
    """The content of a UTF-8 file, without a byte order mark.

    Raises:
      FileError: see `read_bytes`; or the file is not UTF-8.
    """
    return decode_text(read_bytes(path, limit), os.fspath(path))


def decode_text(data: bytes, where: str) -> str:
    """UTF-8 text without a byte order mark. `where` names the source in the error message.

    Raises:
      FileError: it is not UTF-8.
    """
    if data.startswith(UTF16_MARKS):
        raise FileError(f"{where} is UTF-16 text; save it as UTF-8")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise FileError(
            f"{where} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error


def read_json(
    path: PathLike, kind: Any = dict[str, Any], *, limit: int = MAX_BYTES, fix: str = REFETCH
) -> Any:
    """The JSON in a file, decoded by `decode_json`.

    Raises:
      FileError: see `read_bytes` and `decode_json`.
    """
    return decode_json(read_bytes(path, limit), kind, where=os.fspath(path), fix=fix)


def decode_json(
    data: bytes | str,
    kind: Any = dict[str, Any],
    *,
    where: str,
    fix: str = REFETCH,
    unique: bool = False,
) -> Any:
    """JSON as a value of the type `kind`.

    Args:
      data: the text; bytes are UTF-8, with or without a byte order mark.
      kind: any type that `msgspec.json.decode` takes, dataclasses among them. Numbers are not
        rounded, types are not converted, and NaN and infinity are refused.
      where: name of the source in the error message.
      fix: what the error message recommends.
      unique: refuse objects with duplicate keys; otherwise the last value counts.

    Raises:
      FileError: not JSON, not a `kind` (the message names the field), or nested too deeply.
    """
    text = decode_text(data, where) if isinstance(data, bytes) else data
    if _depth(text) > MAX_DEPTH:
        raise FileError(f"{where} cannot be read: it is nested too deeply; {fix}")
    try:
        decoded = msgspec.json.decode(text.encode(), type=kind)
        duplicates = _duplicate_keys(text) if unique else []
    except (msgspec.DecodeError, ValueError) as error:
        raise FileError(f"{where} cannot be read: {_reason(error)}; {fix}") from error
    if duplicates:
        raise FileError(f"{where} has duplicate keys: {', '.join(duplicates)}; {fix}")
    return decoded


def validate(data: Any, kind: Any, *, where: str, fix: str = REFETCH) -> Any:
    """Decoded JSON as a value of the type `kind`; see `decode_json`."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise FileError(f"{where} cannot be read: {_reason(error)}; {fix}") from error


def _reason(error: Exception) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.head.width`" with the field first."""
    reason, _, field = str(error).replace("`", "").partition(" - at ")
    field = re.sub(r"^(key in )?\$\.?", r"\1", field)
    return f"{field}: {reason}" if field else reason


def _depth(text: str) -> int:
    """How deep the brackets outside of strings nest."""
    brackets = re.sub(r'"(?:[^"\\]++|\\.)*+"?|[^][{}"]++', "", text, flags=re.DOTALL)
    codes = np.frombuffer(brackets.encode(), np.uint8)
    steps = np.where(np.isin(codes, np.frombuffer(b"[{", np.uint8)), 1, -1)
    return int(steps.cumsum().max(initial=0))


def _duplicate_keys(text: str) -> list[str]:
    duplicates: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> None:
        counts = Counter(key for key, _ in pairs)
        duplicates.extend(key for key, count in counts.items() if count > 1)

    json.loads(text, object_pairs_hook=collect)
    return duplicates[:20]
