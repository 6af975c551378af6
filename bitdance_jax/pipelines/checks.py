"""Checks arguments of public methods before anything compiles.

Each function returns the value, or raises a UserError.
"""

import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int8, UInt8

from bitdance_jax.config import TokenizerConfig
from bitdance_jax.config.plain import Count, Range, Seed, checked
from bitdance_jax.errors import ConfigError, UserError, short


MAX_ITEMS = 10**6
"""Labels or prompts of one call, which returns all of their images in memory."""


def images(value: Any, config: TokenizerConfig) -> UInt8[np.ndarray, "B H W C"]:
    """Images for the tokenizer to encode. Floats are refused, because their range is unknown."""
    expected = f"images must be uint8 [B, H, W, {config.image_channels}]"
    array = _array(value, expected)
    if array.dtype != np.uint8:
        raise UserError(
            f"{expected} with values 0 ... 255, got {described(array)};"
            " scale, round and convert them first"
        )
    if array.ndim != 4 or array.shape[3] != config.image_channels or 0 in array.shape[1:]:
        one = "; for a single image, give image[None]" if array.ndim == 3 else ""
        raise UserError(f"{expected}, got {described(array)}{one}")
    return array


def codes(
    value: Any, config: TokenizerConfig
) -> Int8[np.ndarray, "B h w K"] | Float32[np.ndarray, "B h w K"]:
    """Codes of any numeric type for the tokenizer to decode: -1 and 1, or finite numbers."""
    continuous = config.latents == "continuous"
    numbers = "finite numbers" if continuous else "-1 or 1"
    expected = f"codes must be {numbers}, [B, h, w, {config.bits}]"
    array = _array(value, expected)
    if (
        array.ndim != 4
        or array.shape[3] != config.bits
        or 0 in array.shape[1:]
        or not jnp.issubdtype(array.dtype, jnp.number)
    ):
        raise UserError(f"{expected}, got {described(array)}")
    if continuous:
        array = array.astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise UserError(f"{expected}, got infinite numbers or NaN")
        return array
    others = array[np.abs(array) != 1]
    if len(others):
        raise UserError(
            f"{expected}, got {len(others)} other numbers, such as {others[0]};"
            " convert bits 0 and 1 with 2 * bits - 1"
        )
    return array.astype(np.int8, copy=False)


def items(value: Any, name: str) -> list[Any]:
    """The items of a sequence or array. A scalar or a string is one item."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return [value]
    if getattr(value, "ndim", 1) == 0:
        return [value]
    several = list(itertools.islice(value, MAX_ITEMS + 1))
    if len(several) > MAX_ITEMS:
        raise ConfigError(
            f"{name} may be at most {MAX_ITEMS:,}; split them over several calls", name
        )
    return several


def seeds(value: Any, count: int) -> int | tuple[int, ...]:
    """One seed of 32 bits, or one for each of `count` images."""
    if isinstance(value, str) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        return checked(Seed, value, "seed")
    several = tuple(checked(Seed, one, "seed") for one in items(value, "seed"))
    if len(several) != count:
        raise ConfigError(
            f"a list of seeds has one for each image: {count} images, got {len(several)} seeds",
            "seed",
        )
    return several


def first_index(value: Any, count: int) -> int:
    """The index of the first of `count` images. All indices must have 32 bits."""
    return checked(Annotated[int, Range(0, 2**32 - count)], value, "first_index")


def model_name(folder: str) -> str:
    """A name for the model in a folder: the folder's, with the run's if it is a run's `model`."""
    parts = Path(os.path.abspath(folder)).parts[-2:]
    return "/".join(parts) if parts[-1:] == ("model",) else parts[-1]


def parse_size(value: Any) -> tuple[int, int]:
    """(height, width) in pixels of "WIDTHxHEIGHT", or of (height, width).

    Raises:
      ConfigError: it is neither.
    """
    if isinstance(value, list | tuple) and len(value) == 2:
        height, width = checked(tuple[Count, Count], value, "size")
        return height, width
    text = value.strip() if isinstance(value, str) else ""
    match = re.fullmatch(r"(\d{1,9})\s*[xX×]\s*(\d{1,9})", text)
    if match is None:
        message = f"size must be WIDTHxHEIGHT in pixels, such as 1024x1024, got {short(value)}"
        raise ConfigError(message, "size")
    return int(match[2]), int(match[1])


def compute_type(value: Any) -> jnp.dtype:
    """float32 or bfloat16."""
    try:
        name = jnp.dtype(value).name
    except TypeError:
        name = value
    return jnp.dtype(checked(Literal["float32", "bfloat16"], name, "dtype"))


def _array(value: Any, expected: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:  # lists whose rows have different lengths
        raise UserError(f"{expected}, got {short(value)}") from error


def described(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
