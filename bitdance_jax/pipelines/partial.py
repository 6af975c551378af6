"""Images of which some patches are drawn and the others not yet."""

from typing import NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Float, Int, Int8, UInt8


GREY = np.uint8(128)


class Partial(NamedTuple):
    """Images that are being drawn.

    Attributes:
      drawn, patches: how many of an image's patches are drawn, and how many there are.
      images: uint8; what is not drawn yet is grey. Colours still change a little: the decoder's norms run over the whole image.
    """

    drawn: int
    patches: int
    images: UInt8[np.ndarray, "B H W 3"]


def fill_in(values: Float[np.ndarray, "N B P K"], sampled: int) -> Int8[np.ndarray, "B T K"]:
    """Codes in {-1, 1} of the sampler's values, in sequence order; where nothing is sampled yet, what is, over and over."""
    codes = np.where(values > 0, np.int8(1), np.int8(-1))
    return rearrange(codes[np.arange(len(codes)) % sampled], "n b p k -> b (n p) k")


def grey_out(
    images: UInt8[np.ndarray, "B H W 3"], tokens: Int[np.ndarray, "U 2"], side: int
) -> UInt8[np.ndarray, "B H W 3"]:
    """Grey in place of some tokens, given by their (x, y) on the grid, each `side` pixels wide and high."""
    height, width = images.shape[1:3]
    mask = np.zeros((height // side, width // side), bool)
    mask[tokens[:, 1], tokens[:, 0]] = True
    return np.where(mask.repeat(side, 0).repeat(side, 1)[..., None], GREY, images)
