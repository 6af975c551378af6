"""Tar files as WebDataset uses them: consecutive members with one key are a sample."""

import contextlib
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bitdance_jax.data.patterns import expand
from bitdance_jax.data.records import Names
from bitdance_jax.data.tar_members import (
    members,
    places,
    read_in_threads,
    read_index,
    save_index,
)
from bitdance_jax.errors import FileError
from bitdance_jax.io import paths
from bitdance_jax.io.image_files import DamagedImage
from bitdance_jax.io.random_access import RandomAccessFile


INDEX_VERSION = 1
SUFFIX = ".tar"

IMAGES = ("jpg", "jpeg", "png", "webp")
"""Extensions of images. Of several in a sample, the first is used."""

MAX_MEMBER_BYTES = 2**28


class Part(NamedTuple):
    """Where a member is in its tar: offset and size in bytes."""

    start: int
    size: int


class Shard:
    """A tar file and its samples.

    Attributes:
      file: the tar.
      samples: by key (the path up to the first dot of the file's name), by extension in lower case.
    """

    def __init__(self, path: str) -> None:
        """Reads all headers, or the index that they were stored in.

        Raises:
          FileError: the tar is missing, unreadable, truncated or damaged.
        """
        self.file = RandomAccessFile(path)
        self.samples: dict[str, dict[str, Part]] = {}
        index = _read_or_make_index(self.file)
        names = Names(index["names"], index["name_ends"])
        for number, (start, size) in enumerate(
            zip(index["starts"].tolist(), index["sizes"].tolist(), strict=True)
        ):
            match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", names[number])
            if match is not None:
                parts = self.samples.setdefault(match[1].removeprefix("./"), {})
                parts[match[2].lower()] = Part(start, size)


def open_shards(pattern: str) -> list[Shard]:
    """The tar files that a pattern names, see `expand`.

    Raises:
      FileError: there are none, or one of them cannot be used.
    """
    files = expand(pattern, SUFFIX)
    return read_in_threads(Shard, files, f"indexing {pattern}", "tar", delay=2)


def image_part(parts: Mapping[str, Part]) -> tuple[str, Part] | None:
    """Extension and place of a sample's image, if it has one."""
    return next(((name, parts[name]) for name in IMAGES if name in parts), None)


def read_member(file: RandomAccessFile, part: Part, name: str) -> bytes:
    """The content of a member.

    Raises:
      DamagedImage: it is too large for an image or a caption; `name` names it.
      FileError: the tar cannot be read.
    """
    if part.size > MAX_MEMBER_BYTES:
        raise DamagedImage(f"cannot read {name} (it has {part.size:,} bytes)", name)
    return file.read(part.start, part.size)


def _index_path(file: RandomAccessFile) -> Path:
    path = file.path if paths.is_remote(file.path) else os.path.realpath(file.path)
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    return paths.user_cache() / "webdataset" / f"{digest}.npz"


def _read_or_make_index(file: RandomAccessFile) -> dict[str, np.ndarray]:
    """Names and places of all members. It is stored in the user's cache folder, where that can be
    written to, and made again when the tar's size or modification time changes."""
    stamp = np.array([INDEX_VERSION, file.size, file.modified])
    path = _index_path(file)
    stored = read_index(path, stamp)
    if stored is not None:
        return stored
    with file.sequential() as stream:
        found = list(members(stream.read, 0, file.size, file.path))
    index = {"stamp": stamp, **places(found)}
    with contextlib.suppress(FileError):  # It saves time, no more.
        save_index(path, index)
    return index
