"""Images in and out: reading, writing, the models' number range, and grids of samples."""

import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Array, Float, Float32, UInt8
from PIL import ExifTags, Image, ImageDraw, ImageFont, UnidentifiedImageError

from bitdance_jax.errors import FileError, UserError
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.io.image_metadata import without_metadata


# numpy stays numpy and JAX stays JAX.
T = TypeVar("T", Array, np.ndarray)

MARGIN = 2  # pixels of white around each image of a grid

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""What is opened, by its contents. Pillow knows more: for one of them it starts another program, Ghostscript."""

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Endings of their names."""

MAX_GRID_PIXELS = 2**28
"""Of a grid of images; that many take 2 GB while it is made."""

MAX_PIXELS = 2**30 // 12
"""Of an image that is opened. One of 89 megapixels takes 1 GB while it is decoded; its file may have a thousandth of that."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation."""


def to_model(image: UInt8[T, "*B H W C"]) -> Float32[T, "*B H W C"]:
    """Bytes to float32 in [-1, 1]."""
    return image.astype("float32") / 127.5 - 1


def to_uint8(image: Float[T, "*B H W C"]) -> UInt8[T, "*B H W C"]:
    """Model range [-1, 1] (what lies outside is clipped) to bytes, as the release does: clip(127.5 y + 128, 0, 255) truncated."""
    # By way of int32: XLA for CPUs drops the truncation of a float that becomes a byte and a float again in one program (jax 0.10.2).
    return (127.5 * image + 128).clip(0, 255).astype("int32").astype("uint8")


class DamagedImage(FileError):
    """An image that cannot be read; the loader of training images goes on without it."""


def load_image(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "H W 3"]:
    """An image file as RGB: turned upright by its EXIF orientation, transparency on white. Of several frames the first.

    Raises:
      DamagedImage: the file is missing, damaged, too large or no image of `FORMATS`.
    """
    if os.path.exists(path) and not os.path.isfile(
        path
    ):  # to open a pipe would wait for its writer
        what = "folder" if os.path.isdir(path) else "pipe or a device"
        raise DamagedImage(f"cannot read the image {os.fspath(path)} (it is a {what}); remove it")
    return decode_image(path, os.fspath(path))


def decode_image(
    file: str | os.PathLike[str] | io.BytesIO, name: str
) -> UInt8[np.ndarray, "H W 3"]:
    """As `load_image`, also of a file in memory; `name` stands in the message."""
    try:
        try:
            return _decode(file)
        except Exception:
            bare = without_metadata(
                file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()
            )
            if bare is None:
                raise
        return _decode(io.BytesIO(bare))
    except UnidentifiedImageError:
        what = "it is no BMP, GIF, JPEG, PNG, TIFF or WebP"
        raise DamagedImage(f"cannot read the image {name} ({what}); remove or replace it") from None
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise DamagedImage(
            f"cannot read the image {name} ({error}); remove or replace it"
        ) from error


def _decode(file: str | os.PathLike[str] | io.BytesIO) -> UInt8[np.ndarray, "H W 3"]:
    with Image.open(file, formats=FORMATS) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(
                f"{opened.width} x {opened.height} are more than {MAX_PIXELS:,} pixels"
            )
        image = _upright(opened)
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey to 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _upright(opened: Image.Image) -> Image.Image:
    """The decoded pixels, turned by the orientation, if the metadata can be read and name one."""
    if opened.format == "PNG":
        opened.load()  # Its EXIF may follow the pixels.
    try:
        turn = _UPRIGHT.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever Pillow raises for metadata that are none
        turn = None
    # Pillow would read the metadata of a TIFF once more while it decodes, and fail.
    opened.getexif = Image.Exif  # type: ignore[method-assign]
    opened.load()
    return opened if turn is None else opened.transpose(turn)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Tries to write where an image shall lie, before long work rather than after it, and leaves nothing there.

    Raises:
      UserError: no file can be written there.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        if path.exists() and not path.is_file():
            raise OSError(None, "it is a device or a pipe; name a file")
        # Folders that are missing are made with the image: by then its model and its prompt are known to be good.
        with tempfile.TemporaryFile(
            dir=next(folder for folder in path.absolute().parents if folder.exists())
        ):
            pass
    except OSError as error:
        raise UserError(f"cannot write the image {path}: {error.strerror or error}") from error


def save_png(path: str | os.PathLike[str], image: UInt8[np.ndarray, "H W 3"]) -> None:
    """Writes a PNG whole or not at all, making its folder if needed.

    Raises:
      UserError: it cannot be written (permissions, full disk).
    """
    with replace_file(path, "the image ") as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def check_grid(count: int, height: int, width: int) -> None:
    """Raises a UserError if so many images of a size are too many for one grid."""
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
    """Images side by side on white, row by row; a last row that is not full ends in white.

    Args:
      images: the images.
      columns: images in a row.
      captions: one label for each row, written to its left.
      enlarge: whole factor by which each image grows.
    """
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    if captions is not None and len(captions) != rows:
        raise ValueError(f"{rows} rows need as many captions, got {len(captions)}")
    cell_height, cell_width = height * enlarge + 2 * MARGIN, width * enlarge + 2 * MARGIN
    font = ImageFont.load_default(size=max(10, min(20, cell_height // 4)))
    left = max((int(font.getlength(caption)) + 4 * MARGIN for caption in captions or ()), default=0)

    canvas = Image.new("RGB", (left + columns * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(canvas)
    for row, caption in enumerate(captions or ()):
        draw.text(
            (2 * MARGIN, (row + 0.5) * cell_height), caption, fill="black", font=font, anchor="lm"
        )
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        image = Image.fromarray(image)
        if enlarge > 1:
            image = image.resize((width * enlarge, height * enlarge), Image.Resampling.LANCZOS)
        canvas.paste(image, (left + column * cell_width + MARGIN, row * cell_height + MARGIN))
    return np.asarray(canvas)
