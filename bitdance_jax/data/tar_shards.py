"""Tar files as WebDataset uses them: consecutive members with one key are a sample."""

import glob
import hashlib
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from bitdance_jax.data.records import Names
from bitdance_jax.data.tar_members import members
from bitdance_jax.errors import FileError
from bitdance_jax.io import paths, readers
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.io.image_files import DamagedImage
from bitdance_jax.io.random_access import RandomAccessFile


INDEX_VERSION = 1
INDEXING_THREADS = 8
"""Indexing mostly waits for the disk or the network."""

IMAGES = ("jpg", "jpeg", "png", "webp")
"""Extensions of images. Of several in a sample, the first is used."""

MAX_MEMBER_BYTES = 2**28
MAX_SHARDS = 1_000_000


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


def is_tar_pattern(pattern: str) -> bool:
    """Whether a pattern names tar files, or a folder that has some."""
    if not paths.is_remote(pattern) and os.path.isdir(pattern):
        return bool(glob.glob(os.path.join(glob.escape(pattern), "*.tar")))
    return pattern.lower().endswith(".tar")


def open_shards(pattern: str) -> list[Shard]:
    """The tar files that a pattern names, see `expand`.

    Raises:
      FileError: there are none, or one of them cannot be used.
    """
    files = expand(pattern)
    with ThreadPoolExecutor(INDEXING_THREADS) as threads:
        bar = tqdm(
            threads.map(Shard, files),
            total=len(files),
            desc=f"indexing {pattern}",
            unit="tar",
            delay=2,
            dynamic_ncols=True,
        )
        return list(bar)


def expand(pattern: str) -> list[str]:
    """The paths that a pattern names, in order.

    Args:
      pattern: a path, local or under gs://. `{000..099}` stands for each of these numbers, `{a,b}`
        for each of these texts; `*`, `?` and `[...]` match the names of files, sorted. A folder
        stands for all tar files in it.

    Raises:
      FileError: it names nothing, or too much.
    """
    found: list[str] = []
    for name in _without_braces(pattern):
        if not paths.is_remote(name) and os.path.isdir(name):
            name = os.path.join(glob.escape(name), "*.tar")
        if not re.search(r"[*?\[]", name):
            found.append(name)
        elif paths.is_remote(name):
            root, _, rest = name.partition("://")[2].partition("/")
            found += sorted(map(os.fspath, epath.Path(f"gs://{root}").glob(rest)))
        else:
            found += sorted(glob.glob(name, recursive=True))
    if not found:
        raise FileError(f"no file matches {pattern}", pattern)
    return found


def _without_braces(pattern: str) -> list[str]:
    pending = [pattern]
    done: list[str] = []
    while pending:
        if len(pending) + len(done) > MAX_SHARDS:
            raise FileError(f"{pattern} stands for more than {MAX_SHARDS:,} files", pattern)
        current = pending.pop(0)
        match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", current)
        if match is None:
            done.append(current)
            continue
        first, last, texts = match.groups()
        if texts is None:
            if int(last) - int(first) >= MAX_SHARDS:
                raise FileError(f"{pattern} stands for more than {MAX_SHARDS:,} files", pattern)
            choices = [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
        else:
            choices = texts.split(",")
        before, after = current[: match.start()], current[match.end() :]
        pending = [f"{before}{choice}{after}" for choice in choices] + pending
    return list(dict.fromkeys(done))


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
    try:
        # np.load does not close a file that it cannot read.
        with open(path, "rb") as stored, np.load(stored) as saved:
            if np.array_equal(saved["stamp"], stamp):
                return dict(saved)
    except (KeyError, *readers.ZIP_ERRORS):
        pass
    with file.sequential() as stream:
        found = list(members(stream.read, 0, file.size, file.path))
    packed = Names.of(member.name for member in found)
    index = {
        "stamp": stamp,
        "names": packed.text,
        "name_ends": packed.ends,
        "starts": np.array([member.start for member in found], np.int64),
        "sizes": np.array([member.size for member in found], np.int64),
    }
    try:
        with replace_file(path, "the index ") as temporary, open(temporary, "wb") as out:
            np.savez(out, **index)  # type: ignore[arg-type]
    except FileError:  # It saves time, no more.
        pass
    return index
