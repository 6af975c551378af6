"""Classifier-free guidance of the head's velocity (paper 3.2): v_u + s (v_c - v_u).

A guidance gives the scale s of every patch and evaluation of the head as one array. The compiled
sampler takes that array as an argument: another scale or schedule compiles nothing.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bitdance_jax.config import SamplerConfig
from bitdance_jax.config.sampler import SCHEDULES
from bitdance_jax.sampling.solvers import Solver


@runtime_checkable
class Guidance(Protocol):
    """What the sampler needs of a guidance."""

    def scales(self, num_patches: int, times: Float[np.ndarray, "E"]) -> Float[np.ndarray, "N E"]:
        """float32; 1 is the conditional velocity, without guidance."""


@dataclass(frozen=True)
class Constant:
    """The same scale everywhere."""

    scale: float

    def scales(self, num_patches: int, times: Float[np.ndarray, "E"]) -> Float[np.ndarray, "N E"]:
        return np.full((num_patches, len(times)), self.scale, np.float32)


@dataclass(frozen=True)
class Linear:
    """1 + (scale - 1) i / N at patch i of N: no guidance at the first patch."""

    scale: float

    def scales(self, num_patches: int, times: Float[np.ndarray, "E"]) -> Float[np.ndarray, "N E"]:
        column = 1 + (self.scale - 1) * (np.arange(num_patches) / num_patches)
        return np.repeat(column.astype(np.float32)[:, None], len(times), axis=1)


@dataclass(frozen=True)
class LimitedInterval:
    """Another guidance, but only at times of the head in [start, end] (arXiv 2404.07724)."""

    guidance: Guidance
    start: float
    end: float

    def scales(self, num_patches: int, times: Float[np.ndarray, "E"]) -> Float[np.ndarray, "N E"]:
        inside = (self.start <= times) & (times <= self.end)
        return np.where(inside, self.guidance.scales(num_patches, times), np.float32(1))


@dataclass(frozen=True)
class LimitedPatches:
    """Another guidance, but only at patches i of N with i / (N - 1) in [start, end]."""

    guidance: Guidance
    start: float
    end: float

    def scales(self, num_patches: int, times: Float[np.ndarray, "E"]) -> Float[np.ndarray, "N E"]:
        position = np.linspace(0, 1, num_patches)[:, None]
        inside = (self.start <= position) & (position <= self.end)
        return np.where(inside, self.guidance.scales(num_patches, times), np.float32(1))


SCHEDULES |= {"linear": Linear, "constant": Constant}


def make_guidance(config: SamplerConfig) -> Guidance | None:
    """The guidance that a config describes; None for a scale of 1: no unconditional rows."""
    if config.guidance_scale == 1:
        return None
    everywhere = SCHEDULES[config.guidance_schedule](config.guidance_scale)
    limited = LimitedInterval(everywhere, config.guidance_start, config.guidance_end)
    return LimitedPatches(limited, config.guidance_patch_start, config.guidance_patch_end)


def guidance_scales(
    config: SamplerConfig, solver: Solver, num_patches: int
) -> Float[np.ndarray, "N E"] | None:
    """Scales of every patch and evaluation; None without guidance."""
    guidance = make_guidance(config)
    if guidance is None:
        return None
    with jax.ensure_compile_time_eval():
        times = np.asarray(solver.times())
    return guidance.scales(num_patches, times)


def rows_of_image(config: SamplerConfig) -> int:
    """With guidance a conditional and an unconditional one."""
    return 1 if make_guidance(config) is None else 2


@dataclass(frozen=True)
class PatchGuidance:
    """Guidance of one patch (`heads.protocols.Guide`).

    Attributes:
      scales: of every evaluation.
      separate: whether the unconditional rows are sampled by themselves; not with weights.
      weights: of several conditions of each image; None: there is one.
    """

    scales: Float[Array, "E"]
    separate: Bool[Array, ""]
    weights: Float[Array, "B conditions"] | None = None

    def __call__(
        self, output: Float[Array, "R P K"], scale: Float[Array, ""]
    ) -> Float[Array, "R P K"]:
        if self.weights is not None:
            return guide_weighted(output, scale, self.weights)
        return guide(output, scale, self.separate)


def guide(
    velocity: Float[Array, "R P K"],
    scale: Float[Array, ""] | float,
    separate: Bool[Array, ""] | bool,
) -> Float[Array, "R P K"]:
    """Guided velocity of rows [conditional; unconditional], the same in both halves.

    Where the streams are `separate`, each row keeps its own velocity.
    """
    conditional, unconditional = jnp.split(velocity, 2)
    guided = unconditional + scale * (conditional - unconditional)
    return jnp.where(separate, velocity, jnp.concatenate([guided, guided]))


def guide_weighted(
    velocity: Float[Array, "R P K"],
    scale: Float[Array, ""] | float,
    weights: Float[Array, "B conditions"],
) -> Float[Array, "R P K"]:
    """v_u + s sum_i w_i (v_i - v_u), the same in all rows of an image (arXiv 2206.01714).

    Args:
      velocity: of rows [first condition; ...; last condition; unconditional].
      scale: s.
      weights: w_i of each image.
    """
    *conditional, unconditional = jnp.split(velocity, weights.shape[1] + 1)
    differences = (
        weights[:, i, None, None] * (c - unconditional) for i, c in enumerate(conditional)
    )
    guided = unconditional + scale * sum(differences)
    return jnp.tile(guided, (weights.shape[1] + 1, 1, 1))
