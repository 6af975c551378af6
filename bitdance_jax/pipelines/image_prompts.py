"""Prompts that show images: questions about them, and instructions to change them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from bitdance_jax.config import TextToImageConfig
from bitdance_jax.data.buckets import Buckets, cover_crop
from bitdance_jax.errors import ConfigError
from bitdance_jax.io import image_files
from bitdance_jax.models.prompt_rows import ShownImage
from bitdance_jax.pipelines.tokenizer import Tokenizer
from bitdance_jax.transformer import order


ImageLike = str | os.PathLike[str] | Image.Image | UInt8[np.ndarray, "H W 3"]
"""A file, a PIL image, or RGB pixels."""


@dataclass(frozen=True)
class ImagePrompt:
    """A prompt that shows images; the model reads them before the text.

    Attributes:
      text: the prompt.
      images: of any size. Each is scaled and cropped around its centre to the nearest of the sizes
        that the model is trained with. `TextToImage.show` encodes an image that several prompts
        or calls show, so that it is encoded once.
    """

    text: str
    images: Sequence[ImageLike | ShownImage]


def fit(image: ImageLike, config: TextToImageConfig, resolution: int) -> np.ndarray:
    """The image with the size of a bucket (`data.buckets`), uint8 [h, w, 3].

    Args:
      image: see ImageLike.
      config: of the model.
      resolution: side of the square that has the bucket's area, in pixels.

    Raises:
      UserError: no image, or damaged.
    """
    pixels = read_pixels(image)
    multiple = config.size_multiple
    # The nearest multiple: small models sample sizes that no bucket list has.
    resolution = max(multiple, resolution // multiple * multiple)
    return cover_crop(pixels, Buckets(resolution, multiple).nearest(*pixels.shape[:2]))


def encode(image: UInt8[np.ndarray, "h w 3"], tokenizer: Tokenizer, patch_side: int) -> ShownImage:
    """A fitted image as the model reads it."""
    bits = order.grid_to_sequence(tokenizer.encode(image[None]), patch_side, "patch")[0]
    return ShownImage(bits, (image.shape[0], image.shape[1]))


def read_pixels(image: Any) -> UInt8[np.ndarray, "H W 3"]:
    if isinstance(image, str | os.PathLike):
        return image_files.load_image(image)
    if isinstance(image, Image.Image):
        return image_files.to_rgb(image)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ConfigError(
            f"image must be a file, a PIL image or uint8 [H, W, 3], got {array.dtype}"
            f" {list(array.shape)}",
            "image",
        )
    return array
