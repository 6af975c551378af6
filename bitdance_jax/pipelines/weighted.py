"""Images of several labels or prompts at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from bitdance_jax.config.plain import checked
from bitdance_jax.errors import ConfigError
from bitdance_jax.pipelines import checks


@dataclass(frozen=True)
class Weighted:
    """Several labels or prompts of one image: their guided velocities are summed.

    The velocity is v_u + s sum_i w_i (v_i - v_u) with the guidance scale s, the weights w_i, and
    v_u of the unconditional or negative prompt (arXiv 2206.01714). A negative weight leads away
    from what it weighs. Each input adds a row to the model's batch. Where the scale is 1, also at
    the first patch of the linear schedule, the sum is that of s = 1.

    Attributes:
      inputs: labels or prompts. The unconditional prompt shows the images of the first one.
      weights: one for each.
    """

    inputs: Sequence[Any]
    weights: Sequence[float]


class Conditions(NamedTuple):
    """The labels or prompts of all images.

    Attributes:
      inputs: those of the first image, of the second, ...
      weights: of those of each image; None: each image has one condition.
    """

    inputs: Any
    weights: Float32[np.ndarray, "inputs conditions"] | None

    @property
    def each(self) -> int:
        """Conditions of an image."""
        return 1 if self.weights is None else self.weights.shape[1]

    def name_of_image(self, text: Callable[[int], str]) -> Callable[[int], str]:
        """The text of an image's conditions, "a cat (1), snow (0.5)", by that of a condition."""
        weights = self.weights
        if weights is None:
            return text

        def name(image: int) -> str:
            first = image * self.each
            pairs = enumerate(weights[image].tolist(), first)
            return ", ".join(f"{text(i)} ({weight:g})" for i, weight in pairs if weight)

        return name


def conditions(inputs: Any, name: str) -> Conditions:
    """The inputs of a call, `Weighted` ones among them taken apart.

    Images with fewer conditions than others repeat the first one with a weight of 0.

    Args:
      inputs: of the call.
      name: what messages call them, "labels" or "prompts".

    Raises:
      ConfigError: another number of weights than inputs, or a weight is no number.
    """
    if isinstance(inputs, np.ndarray):
        return Conditions(inputs, None)
    several = checks.items(inputs, name)
    if not any(isinstance(one, Weighted) for one in several):
        return Conditions(several, None)
    images = [one if isinstance(one, Weighted) else Weighted([one], [1.0]) for one in several]
    for one in images:
        if not one.inputs or len(one.inputs) != len(one.weights):
            raise ConfigError(
                f"weighted {name} need one weight each: "
                f"{len(one.inputs)} of them, got {len(one.weights)} weights",
                "inputs",
            )
    most = max(len(one.inputs) for one in images)
    weights = np.zeros((len(images), most), np.float32)
    padded = []
    for row, one in zip(weights, images, strict=True):
        row[: len(one.inputs)] = [checked(float, weight, "a weight") for weight in one.weights]
        padded += [*one.inputs, *[one.inputs[0]] * (most - len(one.inputs))]
    return Conditions(padded, weights)
