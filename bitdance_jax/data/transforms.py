"""Crops and flips of training images (paper section 4.2), with an explicit numpy Generator.

The crops are those of ADM (arXiv 2105.05233): an image is scaled to a length of its shorter side,
by halving it with a box filter while it is at least twice as long and then bicubically, and a
square is cropped.
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from bitdance_jax.config import AugmentConfig


LONGEST = 16
"""An image of at most this aspect ratio is scaled before it is cropped; of a longer one, only the
cropped part is scaled."""


def scale_shorter_side(
    image: UInt8[np.ndarray, "H W 3"], length: int
) -> UInt8[np.ndarray, "new_H new_W 3"]:
    """Scales so that the shorter side has `length` pixels; an image that has it is unchanged."""
    pil_image = _halve(image, length)
    return np.asarray(pil_image.resize(_scaled_size(pil_image, length), Image.Resampling.BICUBIC))


def centre_crop(
    image: UInt8[np.ndarray, "H W 3"], size: int
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The largest centred square, scaled to `size`."""
    return _scale_and_crop(image, size, size, lambda free: free // 2)


def random_crop(
    image: UInt8[np.ndarray, "H W 3"], size: int, *, min_crop: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """A random square scaled to `size`, whose side is between `min_crop` and 1 of the shorter
    side."""
    length = int(rng.integers(size, math.ceil(size / min_crop), endpoint=True))
    return _scale_and_crop(image, length, size, lambda free: int(rng.integers(free, endpoint=True)))


def _halve(image: UInt8[np.ndarray, "H W 3"], length: int) -> Image.Image:
    pil_image = Image.fromarray(image)
    while min(pil_image.size) >= 2 * length:
        pil_image = pil_image.resize(
            (pil_image.width // 2, pil_image.height // 2), Image.Resampling.BOX
        )
    return pil_image


def _scaled_size(pil_image: Image.Image, length: int) -> tuple[int, int]:
    """Width and height with a shorter side of `length`."""
    scale = length / min(pil_image.size)
    return round(pil_image.width * scale), round(pil_image.height * scale)


def _scale_and_crop(
    image: UInt8[np.ndarray, "H W 3"], length: int, size: int, offset: Callable[[int], int]
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """A square of the scaled image; `offset(free)` is its offset if `free` pixels are not
    cropped."""
    pil_image = _halve(image, length)
    width, height = _scaled_size(pil_image, length)
    top = offset(height - size)
    left = offset(width - size)
    if max(width, height) <= LONGEST * length:
        scaled = np.asarray(pil_image.resize((width, height), Image.Resampling.BICUBIC))
        return scaled[top : top + size, left : left + size]
    # An image of 1 x 65,000 pixels would need gigabytes if it were scaled. Scaling only the cropped
    # part changes the last digits of the sampling points.
    x_scale = pil_image.width / width
    y_scale = pil_image.height / height
    right = min((left + size) * x_scale, pil_image.width)
    bottom = min((top + size) * y_scale, pil_image.height)
    box = (left * x_scale, top * y_scale, right, bottom)
    return np.asarray(pil_image.resize((size, size), Image.Resampling.BICUBIC, box))


def augment(
    image: UInt8[np.ndarray, "H W 3"],
    size: int,
    config: AugmentConfig,
    *,
    rng: np.random.Generator,
    crop: bool = True,
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """A random crop, or the centre crop unless `crop`; flipped with probability `config.flip`."""
    image = (
        random_crop(image, size, min_crop=config.min_crop, rng=rng)
        if crop
        else centre_crop(image, size)
    )
    return image[:, ::-1] if rng.random() < config.flip else image


def cropped_share(config: AugmentConfig, epoch: int) -> float:
    """Share of random crops in an epoch: 1 until `decay_start`, then linearly to 0 at
    `decay_end`."""
    if config.decay_start is None or config.decay_end is None or epoch < config.decay_start:
        return 1.0
    if epoch >= config.decay_end:
        return 0.0
    return (config.decay_end - epoch) / (config.decay_end - config.decay_start)
