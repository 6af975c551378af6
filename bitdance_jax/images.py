"""Pictures in and out: reading, writing, the models' number range, and grids of samples."""

import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Array, Float, Float32, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

from bitdance_jax.errors import UserError
from bitdance_jax.files import replacing


# numpy stays numpy and JAX stays JAX.
T = TypeVar("T", Array, np.ndarray)

MARGIN = 2  # pixels of white around each picture of a grid


def to_model(image: UInt8[T, "*B H W C"]) -> Float32[T, "*B H W C"]:
    """Bytes to float32 in [-1, 1]."""
    return image.astype("float32") / 127.5 - 1


def to_uint8(image: Float[T, "*B H W C"]) -> UInt8[T, "*B H W C"]:
    """Model range [-1, 1] (what lies outside is clipped) to bytes, as the release does: clip(127.5 y + 128, 0, 255) truncated."""
    # By way of int32: XLA for CPUs drops the truncation of a float that becomes a byte and a float again in one program (jax 0.10.2).
    return (127.5 * image + 128).clip(0, 255).astype("int32").astype("uint8")


class DamagedPicture(UserError):
    """A picture that cannot be read; the loader of training pictures goes on without it."""


def load_image(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "H W 3"]:
    """A picture file as RGB: turned upright by its EXIF orientation, transparency on white.

    Raises:
      DamagedPicture: the file is missing, damaged or no picture.
    """
    return decode_image(path, os.fspath(path))


def decode_image(file: str | os.PathLike[str] | io.BytesIO, name: str) -> UInt8[np.ndarray, "H W 3"]:
    """As `load_image`, also of a file in memory; `name` stands in the message."""
    try:
        with Image.open(file) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey to 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise DamagedPicture(f"cannot read the picture {name} ({error}); remove or replace it") from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Tries to write where a picture shall lie, before long work rather than after it, and leaves nothing there.

    Raises:
      UserError: no file can be written there.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        # Folders that are missing are made with the picture: by then its model and its prompt are known to be good.
        with tempfile.TemporaryFile(dir=next(folder for folder in path.absolute().parents if folder.exists())):
            pass
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error.strerror or error}") from error


def save_png(path: str | os.PathLike[str], image: UInt8[np.ndarray, "H W 3"]) -> None:
    """Writes a PNG whole or not at all, making its folder if needed.

    Raises:
      UserError: it cannot be written (permissions, full disk).
    """
    with replacing(path, "the picture ") as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def grid(
    images: UInt8[np.ndarray, "N H W 3"], columns: int, captions: Sequence[str] | None = None, *, enlarge: int = 1
) -> UInt8[np.ndarray, "rows_height columns_width 3"]:
    """Pictures side by side on white, row by row; a last row that is not full ends in white.

    Args:
      images: the pictures.
      columns: pictures in a row.
      captions: one label for each row, written to its left.
      enlarge: whole factor by which each picture grows.
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
        draw.text((2 * MARGIN, (row + 0.5) * cell_height), caption, fill="black", font=font, anchor="lm")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        picture = Image.fromarray(image)
        if enlarge > 1:
            picture = picture.resize((width * enlarge, height * enlarge), Image.Resampling.LANCZOS)
        canvas.paste(picture, (left + column * cell_width + MARGIN, row * cell_height + MARGIN))
    return np.asarray(canvas)
