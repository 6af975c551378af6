"""The official ILSVRC2012_img_train.tar, a tar of one tar per class, read without unpacking it.

The first use reads all headers and writes an index: the offset, size and class of each image. After
that, any number of threads and processes read images at their offsets.
"""

import hashlib
import io
import os
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from bitdance_jax.data.listing import ending, is_image
from bitdance_jax.data.records import Names
from bitdance_jax.data.tar_members import (
    Member,
    members,
    places,
    read_in_threads,
    read_index,
    save_index,
)
from bitdance_jax.errors import FileError
from bitdance_jax.io import readers
from bitdance_jax.io.image_files import DamagedImage, decode_image
from bitdance_jax.io.paths import user_cache
from bitdance_jax.io.readers import reading


INDEX_VERSION = 3
MAX_IMAGE_BYTES = 2**28


class ImagenetTarSource:
    """Images of the official tar, or of any tar of one tar of images per class, named after it.

    Labels number the classes in sorted order, which for WordNet ids is ImageNet's usual order.
    Images are ordered by class, then as in the tar. Names tell which files are images
    (`listing.is_image`). The index is stored beside the tar as `<name>.index.npz`, or in the user's
    cache folder if that folder is read-only. It is made again when the tar's size or modification
    time changes.

    Attributes:
      skipped: number of files in the inner tars that are no images, by their ending.

    Raises:
      FileError: the tar is missing, unreadable or truncated, or has another layout.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        try:
            readers.check_file(self._path)
        except readers.MissingFile as error:
            raise FileError(
                f"no tar at {self._path}; use the official ILSVRC2012_img_train.tar", self._path
            ) from error
        self._open()
        index = _read_or_make_index(self._path, self._descriptor)
        self.class_names = tuple(map(str, index["class_names"]))
        counts = index["skipped_counts"].tolist()
        self.skipped = dict(zip(map(str, index["skipped"]), counts, strict=True))
        self._names = Names(index["names"], index["name_ends"])
        self._starts = index["starts"]
        self._sizes = index["sizes"]
        self._labels = index["labels"]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = self._labels[index]
        name = f"{self._path}/{self.class_names[label]}/{self._names[index]}"
        size = int(self._sizes[index])
        if size > MAX_IMAGE_BYTES:
            raise DamagedImage(f"cannot read the image {name} (it has {size:,} bytes)")
        with reading(self._path):
            data = os.pread(self._descriptor, size, int(self._starts[index]))
        return {"image": decode_image(io.BytesIO(data), name), "label": label}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_descriptor"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        with reading(self._path):
            self._descriptor = os.open(self._path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)


def index_paths(tar: Path) -> tuple[Path, Path]:
    """The two possible paths of a tar's index: beside it, and in the user's cache folder."""
    name = f"{tar.name}.index.npz"
    digest = hashlib.sha256(os.fsencode(tar.resolve())).hexdigest()[:12]
    return tar.with_name(name), user_cache() / f"{digest}-{name}"


def _read_or_make_index(tar: Path, descriptor: int) -> dict[str, np.ndarray]:
    status = os.fstat(descriptor)
    stamp = np.array([INDEX_VERSION, status.st_size, status.st_mtime_ns])
    beside, cached = index_paths(tar)
    for path in (beside, cached):
        stored = read_index(path, stamp)
        if stored is not None:
            return stored
    index = {"stamp": stamp, **_make_index(tar, descriptor, status.st_size)}
    path = beside if os.access(tar.parent, os.W_OK) else cached
    save_index(path, index)
    return index


def _make_index(tar: Path, descriptor: int, size: int) -> dict[str, np.ndarray]:
    """The index of the tar from all its headers; shows a progress bar over the classes."""

    def read(start: int, count: int) -> bytes:
        return os.pread(descriptor, count, start)

    classes = [
        member for member in members(read, 0, size, str(tar)) if member.name.endswith(".tar")
    ]
    if not classes:
        raise FileError(
            f"{tar} has no inner tars, one per class; use the official ILSVRC2012_img_train.tar",
            tar,
        )
    classes.sort(key=lambda member: _stem(member.name))
    names = [_stem(member.name) for member in classes]

    def images(inner: Member) -> list[Member]:
        end = inner.start + inner.size
        files = list(members(read, inner.start, end, f"{inner.name} in {tar}"))
        found = [file for file in files if is_image(file.name)]
        if not found:
            raise FileError(f"{inner.name} in {tar} is empty; download the tar again", tar)
        skipped.update(ending(file.name) for file in files if not is_image(file.name))
        return found

    skipped: Counter[str] = Counter()

    by_class = read_in_threads(images, classes, f"indexing {tar.name}", "class")
    found = [member for inner in by_class for member in inner]
    return {
        "class_names": np.array(names),
        "labels": np.repeat(
            np.arange(len(classes), dtype=np.int32), [len(inner) for inner in by_class]
        ),
        **places(found),
        "skipped": np.array(list(skipped), str),
        "skipped_counts": np.array(list(skipped.values()), np.int64),
    }


def _stem(name: str) -> str:
    return name.rsplit("/", 1)[-1].removesuffix(".tar")
