"""The official ILSVRC2012_img_train.tar, read in place: a tar of one tar a class, of which nothing is unpacked.

Once, all headers are read and an index is written: where each image lies, and which class it is of. From then on an image is one
read at a known place, by any number of threads and processes.
"""

import hashlib
import io
import os
import tarfile
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bitdance_jax.data.listing import ending, is_image
from bitdance_jax.data.records import Names, reading
from bitdance_jax.errors import UserError
from bitdance_jax.io import readers
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.io.image_files import DamagedImage, decode_image


INDEX_VERSION = 2
BLOCK = tarfile.BLOCKSIZE
MAX_IMAGE_BYTES = 2**28
INDEXING_THREADS = 8  # the time goes into waiting for the disk


@dataclass(frozen=True)
class _Member:
    name: str
    start: int
    size: int


class ImagenetTarSource:
    """Images of the official tar, or of any tar whose members are one tar of images a class, named after it.

    Labels number the classes in sorted order, which for WordNet ids is ImageNet's usual order; images are sorted by class, then as
    they lie in the tar; which files are images, their names say (`listing.is_image`). The index is kept beside the tar as
    `<name>.index.npz`, or where that folder cannot be written to, in the user's cache folder; it is made anew when the tar's size or
    time of change is another.

    Attributes:
      left_out: how many files of the inner tars are no images, by their ending.

    Raises:
      UserError: the tar is missing, unreadable, cut, or of another layout.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        try:
            readers.check_file(self._path)
        except readers.MissingFile as error:
            raise UserError(
                f"no tar at {self._path}; give the official ILSVRC2012_img_train.tar"
            ) from error
        self._open()
        index = _read_or_make_index(self._path, self._descriptor)
        self.class_names = tuple(map(str, index["class_names"]))
        self.left_out = dict(
            zip(map(str, index["left_out"]), index["left_out_counts"].tolist(), strict=True)
        )
        self._names = Names(index["names"], index["name_ends"])
        self._starts, self._sizes, self._labels = index["starts"], index["sizes"], index["labels"]

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


def index_places(tar: Path) -> tuple[Path, Path]:
    """Where the index of a tar may be: beside it, or else in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitdance_jax"
    name = f"{tar.name}.index.npz"
    return tar.with_name(
        name
    ), cache / f"{hashlib.sha256(os.fsencode(tar.resolve())).hexdigest()[:12]}-{name}"


def _read_or_make_index(tar: Path, descriptor: int) -> dict[str, np.ndarray]:
    status = os.fstat(descriptor)
    stamp = np.array([INDEX_VERSION, status.st_size, status.st_mtime_ns])
    places = index_places(tar)
    for place in places:
        try:
            with (
                open(place, "rb") as file,
                np.load(file) as saved,
            ):  # it leaves open what is no .npz
                if np.array_equal(saved["stamp"], stamp):
                    return dict(saved)
        except (KeyError, *readers.ZIP_ERRORS):
            pass
    index = {"stamp": stamp, **_make_index(tar, descriptor, status.st_size)}
    beside = os.access(tar.parent, os.W_OK)
    with (
        replace_file(places[0] if beside else places[1], "the index ") as temporary,
        open(temporary, "wb") as out,
    ):
        np.savez(out, **index)  # type: ignore[arg-type]
    return index


def _make_index(tar: Path, descriptor: int, size: int) -> dict[str, np.ndarray]:
    """All headers of the tar, with a progress bar over the classes."""
    classes = [
        member for member in _members(descriptor, 0, size, str(tar)) if member.name.endswith(".tar")
    ]
    if not classes:
        raise UserError(
            f"{tar} holds no inner tars, one a class; give the official ILSVRC2012_img_train.tar"
        )
    classes.sort(key=lambda member: _stem(member.name))
    names = [_stem(member.name) for member in classes]

    def images(inner: _Member) -> list[_Member]:
        members = list(
            _members(descriptor, inner.start, inner.start + inner.size, f"{inner.name} in {tar}")
        )
        found = [member for member in members if is_image(member.name)]
        if not found:
            raise UserError(f"{inner.name} in {tar} is empty; download the tar again")
        others.update(ending(member.name) for member in members if not is_image(member.name))
        return found

    others: Counter[str] = Counter()

    with ThreadPoolExecutor(INDEXING_THREADS) as threads:
        bar = tqdm(
            threads.map(images, classes),
            total=len(classes),
            desc=f"indexing {tar.name}",
            unit="class",
            dynamic_ncols=True,
        )
        by_class = list(bar)
    members = [member for inner in by_class for member in inner]
    packed = Names.of(member.name for member in members)
    return {
        "class_names": np.array(names),
        "labels": np.repeat(
            np.arange(len(classes), dtype=np.int32), [len(inner) for inner in by_class]
        ),
        "starts": np.array([member.start for member in members], np.int64),
        "sizes": np.array([member.size for member in members], np.int64),
        "names": packed.text,
        "name_ends": packed.ends,
        "left_out": np.array(list(others), str),
        "left_out_counts": np.array(list(others.values()), np.int64),
    }


def _members(descriptor: int, start: int, end: int, name: str) -> Iterator[_Member]:
    """The regular files of the tar that lies between two places of a file.

    `tarfile` would take a tar that is cut between two members for a whole one, so only its headers' parser is used.
    """
    place = start
    while True:
        header = os.pread(descriptor, BLOCK, place) if place + BLOCK <= end else b""
        if len(header) < BLOCK:
            raise UserError(
                f"{name} is cut: it ends after {place - start:,} bytes without an end mark; download the tar again"
            )
        if not any(header):
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise UserError(
                f"{name} is no tar or is damaged {place - start:,} bytes from its start ({error})"
            ) from error
        if info.size < 0:
            raise UserError(
                f"{name} is damaged {place - start:,} bytes from its start ({info.name} has {info.size:,} bytes)"
            )
        place += BLOCK
        if place + info.size > end:
            raise UserError(
                f"{name} is cut: {info.name} in it should be {info.size:,} bytes and {end - place:,} are left; download the tar again"
            )
        if info.isreg():
            yield _Member(info.name, place, info.size)
        place += -(-info.size // BLOCK) * BLOCK


def _stem(name: str) -> str:
    return name.rsplit("/", 1)[-1].removesuffix(".tar")
