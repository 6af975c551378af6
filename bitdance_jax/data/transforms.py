"""Crops and flips of training pictures (paper 4.2): pure functions whose randomness is an explicit numpy Generator.

The crops are those of ADM (arXiv 2105.05233): the picture is scaled so that its shorter side gets the wanted length, by halving with a
box filter while it is at least twice as long, then bicubically, and a square is cut out.
"""

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from bitdance_jax.config import AugmentConfig


def scale_shorter_side(image: UInt8[np.ndarray, "H W 3"], length: int) -> UInt8[np.ndarray, "new_H new_W 3"]:
    """Scales so that the shorter side has `length` pixels; a picture that has it already is unchanged."""
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * length:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = length / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def centre_crop(image: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The largest centred square, scaled to `size`."""
    image = scale_shorter_side(image, size)
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def random_crop(
    image: UInt8[np.ndarray, "H W 3"], size: int, min_crop: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """A random square scaled to `size`, whose side is between `min_crop` and 1 of the shorter side."""
    image = scale_shorter_side(image, int(rng.integers(size, math.ceil(size / min_crop), endpoint=True)))
    top = int(rng.integers(image.shape[0] - size, endpoint=True))
    left = int(rng.integers(image.shape[1] - size, endpoint=True))
    return image[top : top + size, left : left + size]


def augment(
    image: UInt8[np.ndarray, "H W 3"], size: int, config: AugmentConfig, rng: np.random.Generator, crop: bool = True
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Random crop, or without `crop` the centre one, then a horizontal flip with probability `config.flip`."""
    image = random_crop(image, size, config.min_crop, rng) if crop else centre_crop(image, size)
    return image[:, ::-1] if rng.random() < config.flip else image


def cropped_share(config: AugmentConfig, epoch: int) -> float:
    """Share of the pictures that get a random crop in an epoch: 1 until `decay_start`, then linearly to 0 at `decay_end`."""
    if config.decay_start is None or config.decay_end is None or epoch < config.decay_start:
        return 1.0
    if epoch >= config.decay_end:
        return 0.0
    return (config.decay_end - epoch) / (config.decay_end - config.decay_start)
