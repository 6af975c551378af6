"""The order of an image's tokens in the sequence (paper 3.3).

Patch raster, or token raster (the ablation of Table 14).
"""

from typing import Literal, TypeVar

import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Shaped


Order = Literal["patch", "token"]
T = TypeVar("T", Array, np.ndarray)


def grid_to_sequence(
    codes: Shaped[T, "B h w K"], patch_side: int, order: Order
) -> Shaped[T, "B T K"]:
    """Tokens of a grid in sequence order.

    "patch": patches in raster order, and the tokens of a patch in raster order; "token": raster
    order.
    """
    side = patch_side if order == "patch" else 1
    return rearrange(codes, "b (h p) (w q) k -> b (h w p q) k", p=side, q=side)


def sequence_to_grid(
    tokens: Float[Array, "B T K"], height: int, patch_side: int, order: Order
) -> Float[Array, "B h w K"]:
    """Inverse of `grid_to_sequence`, for a grid of `height` rows."""
    side = patch_side if order == "patch" else 1
    return rearrange(tokens, "b (h w p q) k -> b (h p) (w q) k", h=height // side, p=side, q=side)


def token_positions(height: int, width: int, patch_side: int, order: Order) -> np.ndarray:
    """Integer (x, y) of every token of a height x width grid, in sequence order: [T, 2]."""
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    side = patch_side if order == "patch" else 1
    return rearrange(np.stack([x, y], axis=-1), "(h p) (w q) xy -> (h w p q) xy", p=side, q=side)
