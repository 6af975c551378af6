"""What comes from outside, or lay on a disk meanwhile: regular files of bounded size, and JSON as the types that are expected.

Whatever is in a file, the outcome is its content or a UserError of one line.
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
from typing import Any, TypeVar

import msgspec
import numpy as np
from etils import epath

from bitdance_jax.errors import FileError, UserError


T = TypeVar("T")
Path = str | os.PathLike[str]

MAX_BYTES = 8 * 2**20
"""Of a config, an index or a journal. Decoded, JSON takes up to thirty times its size in memory."""

MAX_LIST_BYTES = 64 * 2**20
"""Of files that list much: vocabularies, prompts."""

MAX_DEPTH = 100
"""Of JSON. Functions that go through it call themselves at each level."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
BYTE_ORDER_MARKS_OF_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    OverflowError,
    RuntimeError,  # encrypted; NotImplementedError, a feature that Python lacks, is one
    ValueError,  # names that cannot be decoded
)
"""What zipfile raises for a file that it cannot read."""


class MissingFile(FileError):
    """There is no such file."""


def check_file(path: Path) -> epath.Path:
    """The path, local or gs://, if it is that of a file that can be read.

    Raises:
      MissingFile: nothing is there.
      UserError: a folder, a pipe or a device; a pointer of Git LFS in place of the file; no permission; a name that no file can have.
    """
    place = epath.Path(path)
    try:
        if "://" not in str(place) and not stat.S_ISREG(os.stat(place).st_mode):
            raise UserError(f"{place} is not a file, but a folder, a pipe or a device")
        with place.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFile(f"there is no file {place}", place) from error
    except OSError as error:
        raise UserError(f"{place} cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # of os.stat, for NUL characters
        raise UserError(f"{str(place)!r} cannot be the name of a file") from error
    if start == LFS_POINTER:
        raise UserError(
            f"{place} is a pointer of Git LFS and not the file itself; fetch it with: git lfs pull"
        )
    return place


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a file that `check_file` takes.

    Raises:
      UserError: see `check_file`; more than `limit` bytes.
    """
    place = check_file(path)
    try:
        with place.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{place} cannot be read ({error.strerror or error})") from error
    if len(data) > limit:
        raise UserError(f"{place} is larger than such files are: more than {limit:,} bytes")
    return data


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """The content of a file as text, without a byte order mark.

    Raises:
      UserError: see `read_bytes`; not UTF-8.
    """
    return decode_text(read_bytes(path, limit), os.fspath(path))


def decode_text(data: bytes, where: str) -> str:
    """UTF-8 text without its byte order mark; `where` names it in the UserError if it is none."""
    if data.startswith(BYTE_ORDER_MARKS_OF_UTF16):
        raise UserError(f"{where} is UTF-16 text; save it as UTF-8")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error


def read_json(
    path: Path,
    kind: Any = dict[str, Any],
    *,
    limit: int = MAX_BYTES,
    mend: str = "fetch or write it again",
) -> Any:
    """The JSON in a file, as `decode_json` gives it.

    Raises:
      UserError: see `read_bytes` and `decode_json`.
    """
    return decode_json(read_bytes(path, limit), kind, where=os.fspath(path), mend=mend)


def decode_json(
    data: bytes | str,
    kind: Any = dict[str, Any],
    *,
    where: str,
    mend: str = "fetch or write it again",
    unique: bool = False,
) -> Any:
    """JSON as a `kind`: what `msgspec.json.decode` takes for a type, dataclasses among them.

    Args:
      data: the text; as bytes, UTF-8, with or without a byte order mark.
      kind: the type. Numbers are not rounded, no other type is taken for it, and there is no NaN or infinity.
      where: what it is, for the message.
      mend: what helps, for the message.
      unique: refuse objects that have a key twice; else its last value counts.

    Raises:
      UserError: not JSON, not a `kind` (the field is named), nested too deeply.
    """
    text = decode_text(data, where) if isinstance(data, bytes) else data
    if _depth(text) > MAX_DEPTH:
        raise UserError(f"{where} cannot be read: it is nested too deeply; {mend}")
    try:
        decoded = msgspec.json.decode(text.encode(), type=kind)
        twice = _second_keys(text) if unique else []
    except (msgspec.DecodeError, ValueError) as error:
        raise UserError(f"{where} cannot be read: {_reason(error)}; {mend}") from error
    if twice:
        raise UserError(f"{where} has a second key {', a second key '.join(twice)}; {mend}")
    return decoded


def convert(data: Any, kind: Any, *, where: str, mend: str = "fetch or write it again") -> Any:
    """What was read as plain data, as a `kind`; see `decode_json`."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{where} cannot be read: {_reason(error)}; {mend}") from error


def _reason(error: Exception) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.head.width`", with the field first."""
    reason, _, field = str(error).replace("`", "").partition(" - at ")
    field = re.sub(r"^(key in )?\$\.?", r"\1", field)
    return f"{field}: {reason}" if field else reason


def _depth(text: str) -> int:
    """How deep the brackets outside of strings nest."""
    brackets = re.sub(r'"(?:[^"\\]++|\\.)*+"?|[^][{}"]++', "", text, flags=re.DOTALL)
    codes = np.frombuffer(brackets.encode(), np.uint8)
    steps = np.where(np.isin(codes, np.frombuffer(b"[{", np.uint8)), 1, -1)
    return int(steps.cumsum().max(initial=0))


def _second_keys(text: str) -> list[str]:
    twice: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        twice.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)

    json.loads(text, object_pairs_hook=note)
    return twice[:20]
