"""Images in batches: from an .npz in the format of ADM's suite, a folder, or an array."""

import math
import os
import tokenize
import zipfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from bitdance_jax.data.listing import describe_skipped, list_images
from bitdance_jax.data.records import Skipped
from bitdance_jax.data.transforms import centre_crop
from bitdance_jax.errors import FileError
from bitdance_jax.io import readers
from bitdance_jax.io.image_files import MAX_PIXELS, SUFFIXES, DamagedImage, load_image
from bitdance_jax.io.paths import local
from bitdance_jax.io.readers import reading


ARRAY = "arr_0"


@runtime_checkable
class Images(Protocol):
    """uint8 RGB images of one size.

    Attributes:
      size: height and width.
    """

    size: tuple[int, int]

    def __len__(self) -> int: ...

    def batches(self, count: int) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
        """All images in order, `count` at a time; the last batch may be smaller."""
        ...


class ArrayImages:
    """Images in memory."""

    def __init__(self, array: UInt8[np.ndarray, "B H W 3"]) -> None:
        self._array = array
        self.size = (array.shape[1], array.shape[2])

    def __len__(self) -> int:
        return len(self._array)

    def batches(self, count: int) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
        for start in range(0, len(self), count):
            yield self._array[start : start + count]


class NpzImages:
    """`arr_0` of an .npz, compressed or not, of which only one batch is in memory.

    Raises:
      FileError: the file is missing, damaged or has no arr_0, or arr_0 is not uint8 [B, H, W, 3].
        Damage inside arr_0 is found when it is read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        with self._archive() as archive, self._member(archive) as member:
            shape = self._read_header(member)
            if math.prod(shape) > archive.getinfo(member.name).file_size:
                raise self._error("is truncated")
        self._count, self.size = shape[0], (shape[1], shape[2])

    def __len__(self) -> int:
        return self._count

    def batches(self, count: int) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
        height, width = self.size
        with self._archive() as archive, self._member(archive) as member:
            self._read_header(member)
            for start in range(0, self._count, count):
                rows = min(count, self._count - start)
                data = self._read(member, rows * height * width * 3)
                yield np.frombuffer(data, np.uint8).reshape(rows, height, width, 3)

    def _archive(self) -> zipfile.ZipFile:
        try:
            readers.check_file(self._path)
        except readers.MissingFile as error:
            raise FileError(f"no file {self._path}", self._path) from error
        try:
            return zipfile.ZipFile(self._path)
        except readers.ZIP_ERRORS as error:
            raise FileError(
                f"{self._path} cannot be read as an .npz ({error}); write or fetch it again",
                self._path,
            ) from error

    def _member(self, archive: zipfile.ZipFile) -> zipfile.ZipExtFile:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if ARRAY not in names:
            raise FileError(
                f"{self._path} has no array {ARRAY} with the images; "
                f"it has: {', '.join(names) or 'nothing'}",
                self._path,
            )
        try:
            member = archive.open(f"{ARRAY}.npy")
        except (KeyError, *readers.ZIP_ERRORS) as error:
            raise self._error(f"is damaged ({error})") from error
        assert isinstance(member, zipfile.ZipExtFile)
        return member

    def _read_header(self, member: zipfile.ZipExtFile) -> tuple[int, ...]:
        try:
            version = np.lib.format.read_magic(member)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran_order, dtype = read(member)
        except (*readers.ZIP_ERRORS, SyntaxError, TypeError, tokenize.TokenError) as error:
            raise self._error(f"is damaged ({error})") from error
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order or min(shape) < 1:
            what = f"{dtype} {list(shape)}" + (" in Fortran order" if fortran_order else "")
            raise FileError(
                f"{ARRAY} of {self._path} must be uint8 images [B, H, W, 3], and is {what}",
                self._path,
            )
        if shape[1] * shape[2] > MAX_PIXELS:
            raise FileError(
                f"the images of {self._path} are {shape[1]} x {shape[2]}, "
                f"more than {MAX_PIXELS:,} pixels",
                self._path,
            )
        return shape

    def _read(self, member: zipfile.ZipExtFile, length: int) -> bytes:
        try:
            data = member.read(length)
        except readers.ZIP_ERRORS as error:
            raise self._error(f"is damaged ({error})") from error
        if len(data) < length:
            raise self._error("is truncated")
        return data

    def _error(self, what: str) -> FileError:
        message = f"{ARRAY} of {self._path} {what}; write or fetch the file again"
        return FileError(message, self._path)


class FolderImages:
    """All images of a folder and its subfolders, sorted by path (`data.listing`).

    Damaged images are named on stderr and skipped.

    Args:
      path: the folder.
      crop: side of the centre crop, as for ADM's reference images; None: no crop, and all images
        must have the same size.

    Attributes:
      skipped: the numbers of other files, by their suffix.
      damaged: the messages about damaged images so far.

    Raises:
      FileError: no such folder, or no images in it; while reading, too many damaged images, or
        without `crop` an image of another size than the first.
    """

    def __init__(self, path: str | os.PathLike[str], crop: int | None = None) -> None:
        self._folder = os.fspath(path)
        if not local(path).is_dir():
            raise FileError(f"no image folder {self._folder}", path)
        with reading(path):
            self._paths, self.skipped = list_images(path)
        if not self._paths:
            others = f"; {text}" if (text := describe_skipped(self.skipped)) else ""
            raise FileError(
                f"the folder {self._folder} has no images ({', '.join(SUFFIXES)}){others}", path
            )
        self._crop = crop
        self._skipped = Skipped("it is skipped")
        self.damaged = self._skipped.counts
        self.size = (crop, crop) if crop else self._first_size()

    def __len__(self) -> int:
        """The number of images, including damaged ones."""
        return len(self._paths)

    def batches(self, count: int) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
        batch: list[np.ndarray] = []
        found = 0
        for image in self._load_all(ahead=count):
            found += 1
            batch.append(image)
            if len(batch) == count:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)
        if not found:
            raise FileError(
                f"none of the {len(self)} images in {self._folder} can be read", self._folder
            )

    def _load_all(self, *, ahead: int) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """The undamaged images; threads load `ahead` of them in advance."""
        with ThreadPoolExecutor() as pool:
            loading: deque[Future[np.ndarray]] = deque()
            for path in [*self._paths, *[None] * min(ahead, len(self))]:
                if path is not None:
                    loading.append(pool.submit(self._load, path))
                if path is None or len(loading) > ahead:
                    try:
                        image = loading.popleft().result()
                    except DamagedImage as error:
                        self._skipped.add([str(error)], 1)
                    else:
                        self._skipped.add((), 1)
                        yield image

    def _first_size(self) -> tuple[int, int]:
        """The size of the first image that can be read."""
        for path in self._paths:
            try:
                height, width, _ = load_image(path).shape
                return height, width
            except DamagedImage as error:
                last = error
        raise FileError(
            f"none of the {len(self)} images in {self._folder} can be read; the last: {last}",
            self._folder,
        )

    def _load(self, path: str) -> UInt8[np.ndarray, "H W 3"]:
        image = load_image(path)
        if self._crop:
            return centre_crop(image, self._crop)
        if image.shape[:2] != self.size:
            (height, width), (first_height, first_width) = image.shape[:2], self.size
            raise FileError(
                f"{path} is {height} x {width}, and the first image {first_height} x {first_width};"
                " give all the same size",
                path,
            )
        return image


def open_images(path: str | os.PathLike[str], size: int | None = None) -> Images:
    """The images of a folder, cropped to squares of `size` if it is given, or of an .npz.

    Raises:
      FileError: as for `FolderImages` and `NpzImages`, or the images of an .npz have another size.
    """
    if local(path).is_dir():
        return FolderImages(path, size)
    images = NpzImages(path)
    if size is not None and images.size != (size, size):
        height, width = images.size
        raise FileError(
            f"the images of {os.fspath(path)} must be {size} x {size}, and are {height} x {width}",
            path,
        )
    return images
