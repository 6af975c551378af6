"""The checked arguments of a call that samples images."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8, UInt32

from bitdance_jax.config import SamplerConfig
from bitdance_jax.pipelines.batching import ImageKeys
from bitdance_jax.pipelines.given_images import Canvas, paste
from bitdance_jax.pipelines.image_prompts import ImagePrompt
from bitdance_jax.pipelines.weighted import Weighted
from bitdance_jax.sampling.compiled import Inputs
from bitdance_jax.sampling.next_patch import Kept
from bitdance_jax.sampling.solvers import Solver


LabelsOrPrompts = (
    str
    | int
    | ImagePrompt
    | Weighted
    | Sequence[str | int | ImagePrompt | Weighted]
    | Int[np.ndarray, "inputs"]
)
Size = str | tuple[int, int]
"""An image's size in pixels: "WIDTHxHEIGHT", or (height, width) as in the shape of an array."""


class Request(NamedTuple):
    """The checked arguments of a call.

    Attributes:
      inputs: arrays [inputs, ...], one row for each label or prompt.
      shared: see `Inputs`.
      input_name: the text of an input, by its row.
      input_of_image: the row of every image's input.
      keys: of every image.
      size: (height, width) in pixels.
      xy: (x, y) of every token on the grid.
      sampler: solver and guidance of the request.
      solver, scales: the same as the compiled sampler takes them.
      num_patches: of an image.
      batch_size: images at a time.
      weights: of several conditions of each input; None: each is one.
      negative: negative prompts, one for all inputs or one for each; None: there are none.
      canvases: given images, one for each input; None: there are none.
      kept: their kept patches, as the compiled sampler takes them; None until they are encoded.
    """

    inputs: Any
    shared: Any
    input_name: Callable[[int], str]
    input_of_image: Int[np.ndarray, "B"]
    keys: ImageKeys
    size: tuple[int, int]
    xy: Int[np.ndarray, "T 2"]
    sampler: SamplerConfig
    solver: Solver
    scales: Float[np.ndarray, "N E"] | None
    num_patches: int
    batch_size: int
    weights: Float[np.ndarray, "inputs conditions"] | None = None
    negative: tuple[str, ...] | None = None
    canvases: Sequence[Canvas] | None = None
    kept: Kept | None = None

    def batch(self, start: int) -> tuple[Inputs, UInt32[np.ndarray, "B 2"]]:
        """Inputs and keys of the images from `start`; a short last batch repeats the last image."""
        images = np.arange(start, start + self.batch_size).clip(max=self.keys.count - 1)
        rows = self.input_of_image[images]
        inputs, kept, weights = jax.tree.map(
            lambda array: array[rows], (self.inputs, self.kept, self.weights)
        )
        return Inputs(inputs, self.shared, kept, weights), self.keys.data(images)

    def missing(self, sampled: int) -> Bool[np.ndarray, "B N"]:
        """Patches of each image that are neither among the first `sampled` ones nor kept."""
        missing = np.arange(self.num_patches) >= sampled
        if self.kept is None:
            return np.broadcast_to(missing, (self.keys.count, self.num_patches))
        return missing & ~np.asarray(self.kept.mask)[self.input_of_image]

    def pasted(
        self, images: UInt8[np.ndarray, "B H W 3"], start: int
    ) -> UInt8[np.ndarray, "B H W 3"]:
        """The images from `start` on, with the pixels that given images paste."""
        if self.canvases is None:
            return images
        rows = self.input_of_image[start : start + len(images)]
        return paste(images, [self.canvases[row] for row in rows])

    def texts(self, image: int) -> dict[str, str]:
        """What the metadata says of an image's negative prompt and given image."""
        row = self.input_of_image[image]
        text: dict[str, str] = {}
        if self.negative is not None:
            text["negative_prompt"] = self.negative[row % len(self.negative)]
        return text if self.canvases is None else text | self.canvases[row].text

    @property
    def starts(self) -> range:
        return range(0, self.keys.count, self.batch_size)
