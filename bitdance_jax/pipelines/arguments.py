"""What the public methods are given, checked before anything compiles: as it is promised, or a UserError of one line."""

import itertools
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int8, UInt8

from bitdance_jax.config import TokenizerConfig
from bitdance_jax.config.plain import Range, Seed, checked
from bitdance_jax.errors import UserError, short


MAX_ITEMS = 10**6
"""Labels or prompts of one call, which returns all of their images in memory."""


def images(value: Any, config: TokenizerConfig) -> UInt8[np.ndarray, "B H W C"]:
    """Bytes, for the tokenizer to encode. Floats are refused: whether they lie in 0 ... 1 or -1 ... 1, only their owner knows."""
    wanted = f"images must be uint8 [B, H, W, {config.image_channels}]"
    array = _array(value, wanted)
    if array.dtype != np.uint8:
        raise UserError(
            f"{wanted} with values 0 ... 255, got {_described(array)}; scale, round and convert them first"
        )
    if array.ndim != 4 or array.shape[3] != config.image_channels or 0 in array.shape[1:]:
        one = "; of a single image, give image[None]" if array.ndim == 3 else ""
        raise UserError(f"{wanted}, got {_described(array)}{one}")
    return array


def codes(value: Any, config: TokenizerConfig) -> Int8[np.ndarray, "B h w K"]:
    """Numbers -1 and 1 of any type, for the tokenizer to decode."""
    wanted = f"codes must be -1 or 1, [B, h, w, {config.bits}]"
    array = _array(value, wanted)
    if (
        array.ndim != 4
        or array.shape[3] != config.bits
        or 0 in array.shape[1:]
        or not jnp.issubdtype(array.dtype, jnp.number)
    ):
        raise UserError(f"{wanted}, got {_described(array)}")
    odd = array[np.abs(array) != 1]
    if len(odd):
        raise UserError(
            f"{wanted}, got {len(odd)} other numbers, such as {odd[0]}; of bits 0 and 1, give 2 * bits - 1"
        )
    return array.astype(np.int8, copy=False)


def items(value: Any, name: str, example: str) -> list[Any]:
    """A list, tuple or array of several things; not a text, which Python takes for a list of letters."""
    single = isinstance(value, str | bytes) or not isinstance(value, Iterable)
    if single or getattr(value, "ndim", 1) == 0:
        raise UserError(f"{name} must be a list, such as {example}, got {short(value)}")
    several = list(itertools.islice(value, MAX_ITEMS + 1))
    if len(several) > MAX_ITEMS:
        raise UserError(f"{name} may be at most {MAX_ITEMS:,}; draw more in several calls")
    return several


def seed(value: Any) -> int:
    """A number of 32 bits."""
    return checked(Seed, value, "the seed")


def first_index(value: Any, count: int) -> int:
    """The number of the first of `count` images, all of which are numbers of 32 bits."""
    return checked(Annotated[int, Range(0, 2**32 - count)], value, "first_index")


def compute_type(value: Any) -> jnp.dtype:
    """float32 or bfloat16."""
    try:
        name = jnp.dtype(value).name
    except TypeError:
        name = short(value)
    return jnp.dtype(checked(Literal["float32", "bfloat16"], name, "dtype"))


def _array(value: Any, wanted: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:  # of lists whose rows differ in length
        raise UserError(f"{wanted}, got {short(value)}") from error


def _described(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
