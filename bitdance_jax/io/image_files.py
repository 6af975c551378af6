"""Image files: reading, writing, conversion to the models' range, and grids of images."""

import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np
from jaxtyping import Array, Float, Float32, UInt8
from PIL import ExifTags, Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from bitdance_jax.errors import FileError, UserError
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.io.image_metadata import without_metadata


# A numpy array gives a numpy array, a JAX array a JAX array.
T = TypeVar("T", Array, np.ndarray)

MARGIN = 2
"""Pixels of white around each image of a grid."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Formats that are read, recognised by content. For others, Pillow may start Ghostscript."""

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Suffixes of image files."""

MAX_GRID_PIXELS = 2**28
"""Size limit of a grid of images. Making the largest takes 2 GB."""

MAX_PIXELS = 2**30 // 12
"""Size limit of an image that is read.

Decoding 89 megapixels takes 1 GB, and their file may have a thousandth of that.
"""

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that turns an image upright, by its EXIF orientation."""


def to_model(image: UInt8[T, "*B H W C"]) -> Float32[T, "*B H W C"]:
    """Bytes to float32 in [-1, 1]."""
    return image.astype("float32") / 127.5 - 1


def to_uint8(image: Float[T, "*B H W C"]) -> UInt8[T, "*B H W C"]:
    """The models' range [-1, 1] to bytes: clip(127.5 y + 128, 0, 255), truncated, as released."""
    # By way of int32: XLA for CPUs drops the truncation of a float that becomes a byte and a float
    # again in one program (jax 0.10.2).
    return (127.5 * image + 128).clip(0, 255).astype("int32").astype("uint8")


class DamagedImage(FileError):
    """An image that cannot be read. The loader of training images skips it."""


def load_image(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "H W 3"]:
    """An image file as RGB.

    It is turned upright by its EXIF orientation, transparency becomes white, and an animation gives
    its first frame.

    Raises:
      DamagedImage: the file is missing, damaged, too large, or not in one of the `FORMATS`.
    """
    # Opening a pipe would wait for its writer.
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "folder" if os.path.isdir(path) else "pipe or a device"
        reason = f"cannot read the image {os.fspath(path)} (it is a {kind}); remove it"
        raise DamagedImage(reason, path)
    return decode_image(path, os.fspath(path))


def decode_image(
    file: str | os.PathLike[str] | io.BytesIO, name: str
) -> UInt8[np.ndarray, "H W 3"]:
    """Like `load_image`, also for a file in memory. `name` names it in the error message."""
    try:
        try:
            return _decode(file)
        except Exception:
            data = file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()
            stripped = without_metadata(data)
            if stripped is None:
                raise
        return _decode(io.BytesIO(stripped))
    except UnidentifiedImageError:
        reason = "it is not a BMP, GIF, JPEG, PNG, TIFF or WebP"
        cause = None
    except Exception as error:  # Pillow's decoders raise many types for damaged files.
        reason = str(error)
        cause = error
    line = f"cannot read the image {name} ({reason}); remove or replace it"
    raise DamagedImage(line, name) from cause


def _decode(file: str | os.PathLike[str] | io.BytesIO) -> UInt8[np.ndarray, "H W 3"]:
    with Image.open(file, formats=FORMATS) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(
                f"{opened.width} x {opened.height} are more than {MAX_PIXELS:,} pixels"
            )
        image = _upright(opened)
    return to_rgb(image)


def to_rgb(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of an image of any mode; transparency becomes white."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey to 255.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _upright(opened: Image.Image) -> Image.Image:
    """The decoded pixels, turned by the EXIF orientation if it can be read."""
    if opened.format == "PNG":
        opened.load()  # Its EXIF may follow the pixels.
    try:
        orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
        transpose = _TRANSPOSE.get(orientation)
    except Exception:  # Pillow raises many types for damaged metadata.
        transpose = None
    # Pillow would read the metadata of a TIFF once more while it decodes, and fail.
    opened.getexif = Image.Exif  # type: ignore[method-assign]
    opened.load()
    return opened if transpose is None else opened.transpose(transpose)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Checks before a long computation that its image can be written. Leaves no file behind.

    Raises:
      FileError: the image cannot be written.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        if path.exists() and not path.is_file():
            raise OSError(None, "it is a device or a pipe; name a file")
        # Missing folders are made later, with the image.
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise FileError(f"cannot write the image {path}: {reason}", path) from error


def save_png(
    path: str | os.PathLike[str],
    image: UInt8[np.ndarray, "H W 3"],
    *,
    text: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes a PNG atomically and makes its folder if it is missing.

    Args:
      path: of the file.
      image: its pixels.
      text: text chunks by keyword, for example how the image was sampled (`Pipeline.metadata`).

    Raises:
      FileError: it cannot be written (permissions, full disk).
    """
    with replace_file(path, "the image ") as temporary:
        _write_png(temporary, image, text)


def png_bytes(
    image: UInt8[np.ndarray, "H W 3"], *, text: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    """The content of the file that `save_png` writes."""
    file = io.BytesIO()
    _write_png(file, image, text)
    return file.getvalue()


def _write_png(
    file: Path | io.BytesIO, image: UInt8[np.ndarray, "H W 3"], text: Mapping[str, str]
) -> None:
    chunks = PngInfo()
    for keyword, value in text.items():
        chunks.add_text(keyword, value.replace("\0", " "))
    Image.fromarray(image).save(file, format="PNG", pnginfo=chunks)


def check_grid(count: int, height: int, width: int) -> None:
    """Raises a UserError if a grid of this many images would be too large."""
    if count * height * width > MAX_GRID_PIXELS:
        most = MAX_GRID_PIXELS // (height * width)
        raise UserError(
            f"a grid of {count:,} images of {width} x {height} is too large; {most:,} are the most"
        )


def grid(
    images: UInt8[np.ndarray, "N H W 3"],
    columns: int,
    captions: Sequence[str] | None = None,
    *,
    enlarge: int = 1,
) -> UInt8[np.ndarray, "rows_height columns_width 3"]:
    """Images side by side on white, row by row.

    Args:
      images: the images.
      columns: images in a row.
      captions: one label for each row, written to its left.
      enlarge: integer factor by which each image is enlarged.
    """
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    if captions is not None and len(captions) != rows:
        raise ValueError(f"{rows} rows need as many captions, got {len(captions)}")
    cell_height = height * enlarge + 2 * MARGIN
    cell_width = width * enlarge + 2 * MARGIN
    font = ImageFont.load_default(size=max(10, min(20, cell_height // 4)))
    left = max((int(font.getlength(caption)) + 4 * MARGIN for caption in captions or ()), default=0)

    canvas = Image.new("RGB", (left + columns * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(canvas)
    for row, caption in enumerate(captions or ()):
        position = (2 * MARGIN, (row + 0.5) * cell_height)
        draw.text(position, caption, fill="black", font=font, anchor="lm")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        image = Image.fromarray(image)
        if enlarge > 1:
            image = image.resize((width * enlarge, height * enlarge), Image.Resampling.LANCZOS)
        canvas.paste(image, (left + column * cell_width + MARGIN, row * cell_height + MARGIN))
    return np.asarray(canvas)
