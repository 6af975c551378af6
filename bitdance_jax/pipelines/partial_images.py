"""Images of which some patches are sampled and the others not yet."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32, Int, Int8, UInt8

from bitdance_jax.config import Latents
from bitdance_jax.tokenizer.codes import code_dtype, to_latents
from bitdance_jax.transformer import order


GREY = np.uint8(128)


class Partial(NamedTuple):
    """Images that are being sampled.

    Attributes:
      sampled: patches of each image that are sampled.
      patches: patches of each image.
      images: uint8; the other patches are grey. Colours still change a little: the decoder's norms
        run over the entire image.
    """

    sampled: int
    patches: int
    images: UInt8[np.ndarray, "B H W 3"]


def values_to_codes(
    values: Float[Array, "N B P K"],
    sampled: Int[Array, ""],
    *,
    height: int,
    patch_side: int,
    token_order: order.Order,
    latents: Latents,
) -> Int8[Array, "B h w K"] | Float32[Array, "B h w K"]:
    """Codes on a grid of `height` rows; missing patches repeat the sampled ones.

    Codes are in {-1, 1}; those of continuous latents are the values.
    """
    values = values[jnp.arange(len(values)) % sampled]
    tokens = rearrange(to_latents(values, latents), "n b p k -> b (n p) k")
    codes = order.sequence_to_grid(tokens, height, patch_side, token_order)
    return codes.astype(code_dtype(latents))


def grey_out(
    images: UInt8[np.ndarray, "B H W 3"], tokens: Int[np.ndarray, "U 2"], side: int
) -> UInt8[np.ndarray, "B H W 3"]:
    """Grey in place of the tokens at these (x, y) on the grid, each `side` pixels wide and high."""
    height, width = images.shape[1:3]
    mask = np.zeros((height // side, width // side), bool)
    mask[tokens[:, 1], tokens[:, 0]] = True
    return np.where(mask.repeat(side, 0).repeat(side, 1)[..., None], GREY, images)
