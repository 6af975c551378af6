"""Images to be scored, read batch by batch: an .npz as ADM's suite takes it, a folder, or an array."""

import math
import os
import tokenize
import zipfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from bitdance_jax.data.listing import left_out_text, list_images
from bitdance_jax.data.records import Skipped, reading
from bitdance_jax.data.transforms import centre_crop
from bitdance_jax.errors import UserError
from bitdance_jax.io import readers
from bitdance_jax.io.image_files import MAX_PIXELS, SUFFIXES, DamagedImage, load_image


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

    def __init__(self, array: UInt8[np.ndarray, "N H W 3"]) -> None:
        self._array = array
        self.size = (array.shape[1], array.shape[2])

    def __len__(self) -> int:
        return len(self._array)

    def batches(self, count: int) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
        for start in range(0, len(self), count):
            yield self._array[start : start + count]


class NpzImages:
    """`arr_0` of an .npz, read in place: memory holds one batch, whether the file is compressed or not.

    Raises:
      UserError: no such file, damaged, without arr_0, or arr_0 is not uint8 [N, H, W, 3]. Damage inside of arr_0 is found while reading.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        with self._archive() as archive, self._member(archive) as member:
            shape = self._read_header(member)
            if math.prod(shape) > archive.getinfo(member.name).file_size:
                raise UserError(
                    f"{ARRAY} of {self._path} is cut short; write or fetch the file again"
                )
        self._count, self.size = shape[0], (shape[1], shape[2])

    def __len__(self) -> int:
        return self._count

    def batches(self, count: int) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
        height, width = self.size
        with self._archive() as archive, self._member(archive) as member:
            self._read_header(member)
            for start in range(0, self._count, count):
                rows = min(count, self._count - start)
                yield np.frombuffer(
                    self._read(member, rows * height * width * 3), np.uint8
                ).reshape(rows, height, width, 3)

    def _archive(self) -> zipfile.ZipFile:
        try:
            readers.check_file(self._path)
        except readers.MissingFile as error:
            raise UserError(f"no file {self._path}") from error
        try:
            return zipfile.ZipFile(self._path)
        except readers.ZIP_ERRORS as error:
            raise UserError(
                f"{self._path} cannot be read as an .npz ({error}); write or fetch it again"
            ) from error

    def _member(self, archive: zipfile.ZipFile) -> zipfile.ZipExtFile:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if ARRAY not in names:
            raise UserError(
                f"{self._path} has no array {ARRAY}, which holds the images; it has: {', '.join(names) or 'nothing'}"
            )
        try:
            member = archive.open(f"{ARRAY}.npy")
        except (KeyError, *readers.ZIP_ERRORS) as error:
            raise UserError(
                f"{ARRAY} of {self._path} is damaged ({error}); write or fetch the file again"
            ) from error
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
        except (
            *readers.ZIP_ERRORS,
            SyntaxError,
            TypeError,
            tokenize.TokenError,
        ) as error:  # of a header that is no literal
            raise UserError(
                f"{ARRAY} of {self._path} is damaged ({error}); write or fetch the file again"
            ) from error
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order or min(shape) < 1:
            what = f"{dtype} {list(shape)}" + (" in Fortran order" if fortran_order else "")
            raise UserError(
                f"{ARRAY} of {self._path} must be images, uint8 [N, H, W, 3], and is {what}"
            )
        if shape[1] * shape[2] > MAX_PIXELS:
            raise UserError(
                f"the images of {self._path} are {shape[1]} x {shape[2]}, more than {MAX_PIXELS:,} pixels"
            )
        return shape

    def _read(self, member: zipfile.ZipExtFile, length: int) -> bytes:
        try:
            data = member.read(length)
        except readers.ZIP_ERRORS as error:
            raise UserError(
                f"{ARRAY} of {self._path} is damaged ({error}); write or fetch the file again"
            ) from error
        if len(data) < length:
            raise UserError(f"{ARRAY} of {self._path} is cut short; write or fetch the file again")
        return data


class FolderImages:
    """All images of a folder, at any depth, sorted by path (`data.listing`). Damaged ones are named on stderr and left out.

    Args:
      path: the folder.
      crop: side of the square that is cut from the centre, as ADM's reference images were made; None if they have one size already.

    Attributes:
      left_out: how many other files there are, by their ending.
      damaged: the complaints about damaged images met so far.

    Raises:
      UserError: no such folder, no images; while reading, too many damaged ones, or without `crop` one of another size than the first.
    """

    def __init__(self, path: str | os.PathLike[str], crop: int | None = None) -> None:
        self._folder = os.fspath(path)
        if not Path(path).is_dir():
            raise UserError(f"no image folder {self._folder}")
        with reading(path):
            self._paths, self.left_out = list_images(path)
        if not self._paths:
            others = f"; {text}" if (text := left_out_text(self.left_out)) else ""
            raise UserError(
                f"the folder {self._folder} holds no images ({', '.join(SUFFIXES)}){others}"
            )
        self._crop = crop
        self._skipped = Skipped("it is left out")
        self.damaged = self._skipped.counts
        self.size = (crop, crop) if crop else self._first_size()

    def __len__(self) -> int:
        """How many there are, damaged ones included."""
        return len(self._paths)

    def batches(self, count: int) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
        batch: list[np.ndarray] = []
        found = 0
        for image in self._whole(ahead=count):
            found += 1
            batch.append(image)
            if len(batch) == count:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)
        if not found:
            raise UserError(f"none of the {len(self)} images in {self._folder} can be read")

    def _whole(self, *, ahead: int) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """The images that are not damaged, so many of them loaded ahead by threads."""
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
        """Of the first image that can be read."""
        for path in self._paths:
            try:
                height, width, _ = load_image(path).shape
                return height, width
            except DamagedImage as error:
                last = error
        raise UserError(
            f"none of the {len(self)} images in {self._folder} can be read; the last: {last}"
        )

    def _load(self, path: str) -> UInt8[np.ndarray, "H W 3"]:
        image = load_image(path)
        if self._crop:
            return centre_crop(image, self._crop)
        if image.shape[:2] != self.size:
            (height, width), (first_height, first_width) = image.shape[:2], self.size
            raise UserError(
                f"{path} is {height} x {width} and the first image {first_height} x {first_width}; make them one size"
            )
        return image


def open_images(path: str | os.PathLike[str], size: int | None = None) -> Images:
    """The images of a folder, cropped to squares of `size` pixels if that is given, or of an .npz, which must have that size already.

    Raises:
      UserError: see the two classes; or an .npz of another size.
    """
    if Path(path).is_dir():
        return FolderImages(path, size)
    images = NpzImages(path)
    if size is not None and images.size != (size, size):
        height, width = images.size
        raise UserError(
            f"the images of {os.fspath(path)} are {height} x {width}, and {size} x {size} are needed here"
        )
    return images
