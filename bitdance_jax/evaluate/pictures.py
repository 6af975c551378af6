"""Pictures to be scored, read batch by batch: an .npz as ADM's suite takes it, a folder, or an array."""

import os
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from bitdance_jax.data.sources import SUFFIXES
from bitdance_jax.data.transforms import centre_crop
from bitdance_jax.errors import UserError
from bitdance_jax.images import load_image


ARRAY = "arr_0"


@runtime_checkable
class Pictures(Protocol):
    """uint8 RGB pictures of one size.

    Attributes:
      size: height and width.
    """

    size: tuple[int, int]

    def __len__(self) -> int: ...

    def batches(self, count: int) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
        """All pictures in order, `count` at a time; the last batch may be smaller."""
        ...


class ArrayPictures:
    """Pictures in memory."""

    def __init__(self, array: UInt8[np.ndarray, "N H W 3"]) -> None:
        self._array = array
        self.size = (array.shape[1], array.shape[2])

    def __len__(self) -> int:
        return len(self._array)

    def batches(self, count: int) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
        for start in range(0, len(self), count):
            yield self._array[start : start + count]


class NpzPictures:
    """`arr_0` of an .npz, read in place: memory holds one batch, whether the file is compressed or not.

    Raises:
      UserError: no such file, damaged, without arr_0, or arr_0 is not uint8 [N, H, W, 3]. Damage inside of arr_0 is found while reading.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        with self._archive() as archive, self._member(archive) as member:
            shape = self._read_header(member)
        self._count, self.size = shape[0], (shape[1], shape[2])

    def __len__(self) -> int:
        return self._count

    def batches(self, count: int) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
        height, width = self.size
        with self._archive() as archive, self._member(archive) as member:
            self._read_header(member)
            for start in range(0, self._count, count):
                rows = min(count, self._count - start)
                yield np.frombuffer(self._read(member, rows * height * width * 3), np.uint8).reshape(rows, height, width, 3)

    def _archive(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self._path)
        except FileNotFoundError:
            raise UserError(f"no file {self._path}") from None
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{self._path} cannot be read as an .npz ({error}); write or fetch it again") from error

    def _member(self, archive: zipfile.ZipFile) -> zipfile.ZipExtFile:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if ARRAY not in names:
            raise UserError(f"{self._path} has no array {ARRAY}, which holds the pictures; it has: {', '.join(names) or 'nothing'}")
        member = archive.open(f"{ARRAY}.npy")
        assert isinstance(member, zipfile.ZipExtFile)
        return member

    def _read_header(self, member: zipfile.ZipExtFile) -> tuple[int, ...]:
        try:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read(member)
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{ARRAY} of {self._path} is damaged ({error}); write or fetch the file again") from error
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order or 0 in shape:
            what = f"{dtype} {list(shape)}" + (" in Fortran order" if fortran_order else "")
            raise UserError(f"{ARRAY} of {self._path} must be pictures, uint8 [N, H, W, 3], and is {what}")
        return shape

    def _read(self, member: zipfile.ZipExtFile, length: int) -> bytes:
        try:
            data = member.read(length)
        except (EOFError, zipfile.BadZipFile, zlib.error, OSError) as error:
            raise UserError(f"{ARRAY} of {self._path} is damaged ({error}); write or fetch the file again") from error
        if len(data) < length:
            raise UserError(f"{ARRAY} of {self._path} is cut short; write or fetch the file again")
        return data


class FolderPictures:
    """All pictures of a folder, at any depth, sorted by path.

    Args:
      path: the folder.
      crop: side of the square that is cut from the centre, as ADM's reference pictures were made; None if they have one size already.

    Raises:
      UserError: no such folder, no pictures; while reading, a damaged picture, or without `crop` one of another size than the first.
    """

    def __init__(self, path: str | os.PathLike[str], crop: int | None = None) -> None:
        if not Path(path).is_dir():
            raise UserError(f"no picture folder {os.fspath(path)}")
        self._paths = sorted(
            file for file in Path(path).rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
        )
        if not self._paths:
            raise UserError(f"the folder {os.fspath(path)} holds no pictures ({', '.join(SUFFIXES)})")
        self._crop = crop
        height, width, _ = load_image(self._paths[0]).shape
        self.size = (crop, crop) if crop else (height, width)

    def __len__(self) -> int:
        return len(self._paths)

    def batches(self, count: int) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
        with ThreadPoolExecutor() as pool:
            loading = None
            for start in range(0, len(self), count):
                following = [pool.submit(self._load, path) for path in self._paths[start : start + count]]
                if loading:
                    yield np.stack([future.result() for future in loading])
                loading = following
            if loading:
                yield np.stack([future.result() for future in loading])

    def _load(self, path: Path) -> UInt8[np.ndarray, "H W 3"]:
        image = load_image(path)
        if self._crop:
            return centre_crop(image, self._crop)
        if image.shape[:2] != self.size:
            (height, width), (first_height, first_width) = image.shape[:2], self.size
            raise UserError(f"{path} is {height} x {width} and the first picture {first_height} x {first_width}; make them one size")
        return image


def open_pictures(path: str | os.PathLike[str], size: int | None = None) -> Pictures:
    """The pictures of a folder, cropped to squares of `size` pixels if that is given, or of an .npz, which must have that size already.

    Raises:
      UserError: see the two classes; or an .npz of another size.
    """
    if Path(path).is_dir():
        return FolderPictures(path, size)
    pictures = NpzPictures(path)
    if size is not None and pictures.size != (size, size):
        height, width = pictures.size
        raise UserError(f"the pictures of {os.fspath(path)} are {height} x {width}, and {size} x {size} are needed here")
    return pictures
