"""Images of which a part is given: some patches are kept, the model samples the others."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import PIL.Image
from einops import reduce
from jaxtyping import Bool, Float32, Int, Int8, UInt8
from scipy import ndimage

from bitdance_jax.config import TokenizerConfig
from bitdance_jax.config.plain import Natural, Range, checked
from bitdance_jax.errors import ConfigError
from bitdance_jax.pipelines import checks
from bitdance_jax.pipelines.image_prompts import ImageLike, read_pixels
from bitdance_jax.pipelines.partial_images import pixels_of_patches
from bitdance_jax.pipelines.tokenizer import Tokenizer
from bitdance_jax.sampling.next_patch import Kept
from bitdance_jax.tokenizer.codes import code_dtype


ImageCodes = Int8[np.ndarray, "h w K"] | Float32[np.ndarray, "h w K"]
MaskLike = str | os.PathLike[str] | PIL.Image.Image | Bool[np.ndarray, "H W"]

WHITE = 128
"""The least grey of a mask that is white."""


@dataclass(frozen=True, eq=False)
class Given:
    """An image of which a part is given (`Pipeline.sample`, `Pipeline.complete`).

    A patch is kept if all of its pixels are in the image and not masked; it is sampled anew if any
    of them is masked or outside.

    Attributes:
      image: a file, a PIL image or uint8 [H, W, 3], of whose masked pixels nothing is read; or
        codes [h, w, K] as `sample(output="codes")` returns them, kept as they are.
      mask: as large as the image: a file or a PIL image, white (128 and more) where it is sampled
        anew, or an array, True there. None: nowhere.
      keep_patches: only the first patches, in the model's order, are kept; None: any.
      at: (y, x) in pixels of the image's upper left corner on a larger canvas, whose size is that
        of the sampled images. None: the image is the canvas.
      paste: kept patches show the image's own pixels; otherwise those that the tokenizer decodes.
    """

    image: ImageLike | ImageCodes
    mask: MaskLike | None = None
    keep_patches: int | None = None
    at: tuple[int, int] | None = None
    paste: bool = False


class Canvas(NamedTuple):
    """A given image, as large as the sampled ones.

    Attributes:
      image: pixels, or codes.
      known: pixels that are in the image and not masked.
      kept: the patches that are not sampled.
      pasted: pixels that replace decoded ones.
      text: what the image's metadata says of it.
    """

    image: UInt8[np.ndarray, "H W 3"] | ImageCodes
    known: Bool[np.ndarray, "H W"]
    kept: Bool[np.ndarray, "N"]
    pasted: Bool[np.ndarray, "H W"] | None
    text: dict[str, str]


def read_image(given: Any, config: TokenizerConfig) -> UInt8[np.ndarray, "h w 3"] | ImageCodes:
    """Pixels or codes of a given image.

    Raises:
      UserError: neither, or an image that cannot be read.
    """
    image = checked(Given, given, "given").image
    if _is_codes(image, config):
        return checks.codes(image[None], config)[0]
    return read_pixels(image)


def size_in_pixels(image: np.ndarray, config: TokenizerConfig) -> tuple[int, int]:
    """(height, width) of pixels or codes."""
    scale = config.downsampling if _is_codes(image, config) else 1
    return image.shape[0] * scale, image.shape[1] * scale


def place(
    given: Given,
    image: UInt8[np.ndarray, "h w 3"] | ImageCodes,
    size: tuple[int, int],
    *,
    xy: Int[np.ndarray, "T 2"],
    num_patches: int,
    config: TokenizerConfig,
) -> Canvas:
    """A given image on its canvas.

    Args:
      given: the image.
      image: `read_image` of it.
      size: (height, width) of the canvas in pixels.
      xy: (x, y) of every token on the grid, in sequence order.
      num_patches: N.
      config: of the tokenizer.

    Raises:
      UserError: an image or mask of a wrong size, or nothing to sample.
    """
    own = size_in_pixels(image, config)
    top, left = _corner(given, own, size)
    known = np.zeros(size, bool)
    known[top : top + own[0], left : left + own[1]] = ~_read_mask(given.mask, own)
    down = config.downsampling
    tokens = reduce(known, "(h a) (w b) -> h w", "min", a=down, b=down)
    kept = tokens[xy[:, 1], xy[:, 0]].reshape(num_patches, -1).all(axis=1)
    if given.keep_patches is not None:
        first = checked(Annotated[int, Range(0, num_patches)], given.keep_patches, "keep_patches")
        kept &= np.arange(num_patches) < first
    if kept.all():
        raise ConfigError(
            f"all {num_patches} patches are kept, so nothing is sampled; give a mask with white "
            "pixels, fewer keep_patches or a larger size",
            "mask",
        )
    codes = _is_codes(image, config)
    scale = down if codes else 1
    if top % scale or left % scale:
        raise ConfigError(f"codes are placed at multiples of {scale} pixels, got {given.at}", "at")
    canvas = np.ones((size[0] // scale, size[1] // scale, image.shape[2]), image.dtype)
    y, x = top // scale, left // scale
    canvas[y : y + image.shape[0], x : x + image.shape[1]] = image
    pasted = None
    if given.paste:
        if codes:
            raise ConfigError("paste needs the pixels of the image, and got its codes", "paste")
        pasted = pixels_of_patches(kept[None], xy, down)[0]
    return Canvas(canvas, known, kept, pasted, _describe(given, kept))


def encode(canvases: Sequence[Canvas], tokenizer: Tokenizer, xy: Int[np.ndarray, "T 2"]) -> Kept:
    """The kept patches of canvases, one row for each.

    Raises:
      UserError: the tokenizer has no encoder.
    """
    config = tokenizer.config
    height, width = (side // config.downsampling for side in canvases[0].known.shape)
    shape = (len(canvases), height, width, config.bits)
    codes = np.ones(shape, code_dtype(config.latents))
    pixels = []
    for row, canvas in enumerate(canvases):
        if _is_codes(canvas.image, config):
            codes[row] = canvas.image
        elif canvas.kept.any():
            pixels.append(row)
    if pixels:
        filled = [fill(canvases[row].image, canvases[row].known) for row in pixels]
        codes[pixels] = tokenizer.encode(np.stack(filled))
    mask = np.stack([canvas.kept for canvas in canvases])
    values = codes[:, xy[:, 1], xy[:, 0]].reshape(*mask.shape, -1, config.bits)
    return Kept(values, mask)


def fill(
    image: UInt8[np.ndarray, "H W 3"], known: Bool[np.ndarray, "H W"]
) -> UInt8[np.ndarray, "H W 3"]:
    """The image with the nearest known pixel in place of each unknown one.

    So the codes of kept patches, which the encoder computes from the pixels around them too, do
    not depend on what is replaced. At least one pixel is known.
    """
    if known.all():
        return image
    y, x = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
    return image[y, x]


def one_for_each(inputs: Any, count: int) -> list[Any]:
    """A single input as often as there are given images; several as they are."""
    several = checks.items(inputs, "inputs")
    return several * count if len(several) == 1 else several


def for_inputs(canvases: Sequence[Canvas], num_inputs: int) -> Sequence[Canvas]:
    """The canvas of each input: one for all, or one for each.

    Raises:
      ConfigError: another number.
    """
    if len(canvases) == 1:
        return [*canvases] * num_inputs
    if len(canvases) != num_inputs:
        raise ConfigError(
            f"give one image for all inputs or one for each: {num_inputs} inputs, got "
            f"{len(canvases)} images",
            "given",
        )
    return canvases


def paste(
    images: UInt8[np.ndarray, "B H W 3"], canvases: Sequence[Canvas]
) -> UInt8[np.ndarray, "B H W 3"]:
    """Sampled images with the pixels that their canvases paste."""
    if all(canvas.pasted is None for canvas in canvases):
        return images
    images = images.copy()
    for image, canvas in zip(images, canvases, strict=True):
        if canvas.pasted is not None:
            image[canvas.pasted] = canvas.image[canvas.pasted]
    return images


def _is_codes(image: Any, config: TokenizerConfig) -> bool:
    if not isinstance(image, np.ndarray) or image.dtype == np.uint8:
        return False
    return image.ndim == 3 and image.shape[2] == config.bits


def _corner(given: Given, own: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Where the image is on the canvas."""
    sizes = f"the image is {_wxh(own)} and the canvas {_wxh(size)}"
    if given.at is None:
        if own != size:
            raise ConfigError(
                f"{sizes}; scale or crop it, or give at, where a smaller image is placed", "image"
            )
        return 0, 0
    top, left = checked(tuple[Natural, Natural], given.at, "at")
    if top + own[0] > size[0] or left + own[1] > size[1]:
        raise ConfigError(f"{sizes}: it does not fit at row {top}, column {left}", "at")
    return top, left


def _read_mask(mask: Any, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Whether a pixel is sampled anew."""
    if mask is None:
        return np.zeros(size, bool)
    if isinstance(mask, np.ndarray) and mask.dtype == bool:
        masked = mask
    elif isinstance(mask, str | os.PathLike | PIL.Image.Image):
        rgb = PIL.Image.fromarray(read_pixels(mask))
        masked = np.asarray(rgb.convert("L")) >= WHITE
    else:
        got = checks.described(np.asarray(mask))
        raise ConfigError(f"mask must be a file, a PIL image or bool [H, W], got {got}", "mask")
    if masked.shape != size:
        got = _wxh(masked.shape) if masked.ndim == 2 else checks.described(masked)
        raise ConfigError(f"the mask is {got} and the image {_wxh(size)}; scale the mask", "mask")
    return masked


def _describe(given: Given, kept: Bool[np.ndarray, "N"]) -> dict[str, str]:
    named = {"completed": given.image, "mask": given.mask}
    text = {
        name: Path(file).name for name, file in named.items() if isinstance(file, str | os.PathLike)
    }
    return text | {"kept_patches": ranges(kept), "pasted": str(given.paste)}


def ranges(mask: Bool[np.ndarray, "N"]) -> str:
    """The numbers where a mask is true: "0-4, 7"; "none"."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    parts = [
        str(first) if first == last else f"{first}-{last}"
        for first, last in zip(edges[::2], edges[1::2] - 1, strict=True)
    ]
    return ", ".join(parts) or "none"


def _wxh(size: Sequence[int]) -> str:
    return f"{size[1]}x{size[0]}"
