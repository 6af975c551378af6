"""The members of a tar file by its headers, without reading what is between them."""

import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from bitdance_jax.data.records import Names
from bitdance_jax.errors import FileError
from bitdance_jax.io import readers
from bitdance_jax.io.atomic import replace_file


T = TypeVar("T")
R = TypeVar("R")

BLOCK = tarfile.BLOCKSIZE
INDEXING_THREADS = 8
"""Indexing mostly waits for the disk or the network."""

MAX_EXTENDED_BYTES = 2**20
"""Size limit of an extended header."""


@dataclass(frozen=True)
class Member:
    """A regular file in a tar.

    Attributes:
      name: its path.
      start: offset of its first byte.
      size: in bytes.
    """

    name: str
    start: int
    size: int


def members(read: Callable[[int, int], bytes], start: int, end: int, name: str) -> Iterator[Member]:
    """The regular files of the tar between two offsets of a file, in order.

    Only `tarfile`'s parser of headers is used: `tarfile` itself does not notice that a tar is
    truncated between two members.

    Args:
      read: returns the bytes from an offset, at most a number of them.
      start, end: of the tar.
      name: of the tar, for messages.

    Raises:
      FileError: the tar is truncated or damaged.
    """
    offset = start
    long_name = None
    while True:
        header = read(offset, BLOCK) if offset + BLOCK <= end else b""
        position = f"{offset - start:,} bytes"
        if len(header) < BLOCK:
            raise FileError(
                f"{name} is truncated: it ends after {position} without an end mark; "
                "download the tar again"
            )
        if not any(header):
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise FileError(
                f"{name} is no tar or is damaged {position} from its start ({error})"
            ) from error
        if info.size < 0:
            raise FileError(
                f"{name} is damaged {position} from its start ({info.name} has {info.size:,} bytes)"
            )
        offset += BLOCK
        if offset + info.size > end:
            raise FileError(
                f"{name} is truncated: {info.name} in it has {info.size:,} bytes "
                f"and {end - offset:,} are left; download the tar again"
            )
        if info.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            data = read(offset, min(info.size, MAX_EXTENDED_BYTES))
            long_name = _long_name(data, info.type) or long_name
        elif info.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            if info.isreg():
                yield Member(long_name or info.name, offset, info.size)
            long_name = None
        offset += -(-info.size // BLOCK) * BLOCK


def _long_name(data: bytes, kind: bytes) -> str | None:
    """The name of the next member in an extended header, if it has one."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    # Records "LENGTH KEY=VALUE\n", whose length counts all of them.
    while data:
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            return None
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return None


def read_in_threads(
    function: Callable[[T], R], items: Sequence[T], title: str, unit: str, delay: int = 0
) -> list[R]:
    """`function` of every item, in order; shows progress after `delay` seconds."""
    with ThreadPoolExecutor(INDEXING_THREADS) as threads:
        bar = tqdm(
            threads.map(function, items),
            total=len(items),
            desc=title,
            unit=unit,
            delay=delay,
            dynamic_ncols=True,
        )
        return list(bar)


def places(found: Sequence[Member]) -> dict[str, np.ndarray]:
    """Names and places of members as the arrays of an index (`records.Names`)."""
    packed = Names.of(member.name for member in found)
    return {
        "names": packed.text,
        "name_ends": packed.ends,
        "starts": np.array([member.start for member in found], np.int64),
        "sizes": np.array([member.size for member in found], np.int64),
    }


def save_index(path: Path, index: dict[str, np.ndarray]) -> None:
    """Stores the arrays of an index, with its stamp.

    Raises:
      FileError: it cannot be written.
    """
    with replace_file(path, "the index ") as temporary, open(temporary, "wb") as out:
        np.savez(out, **index)  # type: ignore[arg-type]


def read_index(path: Path, stamp: np.ndarray) -> dict[str, np.ndarray] | None:
    """The arrays of an index that was stored with this stamp, if there is one."""
    try:
        # np.load does not close a file that it cannot read.
        with open(path, "rb") as file, np.load(file) as saved:
            return dict(saved) if np.array_equal(saved["stamp"], stamp) else None
    except (KeyError, *readers.ZIP_ERRORS):
        return None
