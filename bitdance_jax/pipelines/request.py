"""The checked arguments of a call that samples images."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, UInt32

from bitdance_jax.config import SamplerConfig
from bitdance_jax.pipelines.batching import ImageKeys
from bitdance_jax.pipelines.image_prompts import ImagePrompt
from bitdance_jax.sampling.compiled import Inputs
from bitdance_jax.sampling.solvers import Solver


LabelsOrPrompts = (
    str | int | ImagePrompt | Sequence[str | int | ImagePrompt] | Int[np.ndarray, "inputs"]
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

    def batch(self, start: int) -> tuple[Inputs, UInt32[np.ndarray, "B 2"]]:
        """Inputs and keys of the images from `start`; a short last batch repeats the last image."""
        images = np.arange(start, start + self.batch_size).clip(max=self.keys.count - 1)
        rows = self.input_of_image[images]
        inputs = jax.tree.map(lambda array: array[rows], self.inputs)
        return Inputs(inputs, self.shared), self.keys.data(images)

    @property
    def starts(self) -> range:
        return range(0, self.keys.count, self.batch_size)
