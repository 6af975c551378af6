"""Images of which some patches are sampled and the others not yet."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Float32, Int, Int8, UInt8

from bitdance_jax.config import Latents
from bitdance_jax.sampling.next_patch import Kept
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
    kept: Kept | None = None,
    *,
    height: int,
    patch_side: int,
    token_order: order.Order,
    latents: Latents,
) -> Int8[Array, "B h w K"] | Float32[Array, "B h w K"]:
    """Codes on a grid of `height` rows; missing patches repeat the sampled ones.

    Codes are in {-1, 1}; those of continuous latents are the values. `kept` patches are never
    missing.
    """
    values = values[jnp.arange(len(values)) % sampled]
    if kept is not None:
        given = rearrange(jnp.asarray(kept.values), "b n p k -> n b p k").astype(values.dtype)
        values = jnp.where(jnp.asarray(kept.mask).T[..., None, None], given, values)
    tokens = rearrange(to_latents(values, latents), "n b p k -> b (n p) k")
    codes = order.sequence_to_grid(tokens, height, patch_side, token_order)
    return codes.astype(code_dtype(latents))


def pixels_of_patches(
    patches: Bool[np.ndarray, "B N"], xy: Int[np.ndarray, "T 2"], side: int
) -> Bool[np.ndarray, "B H W"]:
    """The pixels of some patches of each image.

    Args:
      patches: which ones.
      xy: (x, y) of every token on the grid, in sequence order.
      side: pixels of a token's side.
    """
    tokens = patches.repeat(len(xy) // patches.shape[1], axis=1)
    width, height = xy.max(axis=0) + 1
    grid = np.zeros((len(patches), height, width), bool)
    grid[:, xy[:, 1], xy[:, 0]] = tokens
    return grid.repeat(side, 1).repeat(side, 2)
