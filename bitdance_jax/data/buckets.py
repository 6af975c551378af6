"""Sizes of training images: lists of equal area, and the crop that fits an image to one of them."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from bitdance_jax.config.plain import Config, ImageSide, Size
from bitdance_jax.errors import ConfigError


TooSmall = Literal["upscale", "skip"]
"""What happens to an image that does not cover its size: it is enlarged or left out."""

LONGEST = 4
"""Largest aspect ratio of a bucket."""

AREA_SHARE = 0.8
"""A bucket has at least this share of the square's area, and at most its inverse."""

_LISTS = {
    1024: ((512, 2048), (512, 1920), (640, 1536), (768, 1280), (896, 1152), (1024, 1024)),
    512: ((256, 1024), (256, 896), (384, 640), (512, 512)),
    256: ((128, 512), (192, 384), (192, 320), (256, 256)),
}
"""The sizes that the released models were trained with at 1024 and 512 pixels; at 256 our choice.
Height and width; their transposes belong to them."""


@dataclass(frozen=True)
class Buckets(Config):
    """The sizes of one resolution.

    Attributes:
      resolution: side of the square in pixels; all sizes have about its area.
      size_multiple: heights and widths are its multiples, see
        `TextToImageConfig.size_multiple`.

    Raises:
      ConfigError: the resolution is no multiple of it.
    """

    resolution: ImageSide
    size_multiple: Size

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution % self.size_multiple:
            raise ConfigError(
                f"data.resolutions must be multiples of {self.size_multiple} pixels, the side of"
                f" the model's patches, got {self.resolution}",
                "data.resolutions",
            )

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Heights and widths, from wide to tall."""
        listed = _LISTS.get(self.resolution, ())
        if not listed or any(side % self.size_multiple for size in listed for side in size):
            listed = tuple(self._computed())
        both = {*listed, *((width, height) for height, width in listed)}
        return tuple(sorted(both, key=lambda size: size[0] / size[1]))

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the bucket whose aspect ratio is the nearest, as a factor."""
        ratio = math.log(height / width)
        return min(self.sizes, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))

    def _computed(self) -> list[tuple[int, int]]:
        """For each height up to the square's, the width that gives the nearest area."""
        step = self.size_multiple
        area = self.resolution**2
        sizes = []
        for height in range(step, self.resolution + 1, step):
            width = round(area / height / step) * step
            share = height * width / area
            if width <= LONGEST * height and AREA_SHARE <= share <= 1 / AREA_SHARE:
                sizes.append((height, width))
        return sizes


def is_covered(image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> bool:
    """Whether the image covers a size without being enlarged."""
    return image.shape[0] >= size[0] and image.shape[1] >= size[1]


def cover_crop(
    image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "h w 3"]:
    """The image scaled to cover a height and width, and cropped around its centre.

    It is halved with a box filter while it is at least twice as large in both directions, then
    scaled bicubically, as in `transforms`.
    """
    height, width = size
    scaled = Image.fromarray(image)
    while scaled.height >= 2 * height and scaled.width >= 2 * width:
        scaled = scaled.resize((scaled.width // 2, scaled.height // 2), Image.Resampling.BOX)
    factor = min(scaled.height / height, scaled.width / width)
    top = (scaled.height - factor * height) / 2
    left = (scaled.width - factor * width) / 2
    box = (left, top, left + factor * width, top + factor * height)
    return np.asarray(scaled.resize((width, height), Image.Resampling.BICUBIC, box))
