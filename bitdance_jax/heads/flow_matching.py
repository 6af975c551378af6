"""Flow matching of bits (paper 3.2, equations 3 and 4): training pairs, the loss, and the velocity.

A patch moves on a straight line from noise at t = 0 to its bits at t = 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bitdance_jax.config import FlowHeadConfig
from bitdance_jax.heads.protocols import Guide, Velocity


MIN_REMAINING = 0.05
"""Velocities divide by the remaining time, max(1 - t, 0.05)."""


class FlowNoise(NamedTuple):
    """Standard normal numbers of a training step, for M noisy versions of each patch.

    Attributes:
      time: becomes the times (`training_times`).
      bits: the noise end of the line.
    """

    time: Float[Array, "*B M N"]
    bits: Float[Array, "*B M N P K"]


def remaining_time(t: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return jnp.maximum(1 - t, MIN_REMAINING)


def shift_time(t: Float[Array, "*B"], shift: float) -> Float[Array, "*B"]:
    """t <- (1/s) / (1/s + 1/t - 1), written so that t = 0 stays 0."""
    return t / (t + shift * (1 - t))


def training_times(normal: Float[Array, "*B"], config: FlowHeadConfig) -> Float[Array, "*B"]:
    """Times in [0, 1] from standard normal numbers: logit-normal or uniform, then shifted."""
    if config.time_distribution == "logit_normal":
        t = jax.nn.sigmoid(config.time_std * normal + config.time_mean)
    else:
        t = jax.scipy.stats.norm.cdf(normal)
    return shift_time(t, config.time_shift)


def interpolate(
    bits: Float[Array, "*#B P K"], noise: Float[Array, "*#B P K"], t: Float[Array, "*B"]
) -> Float[Array, "*B P K"]:
    """x_t = t x + (1 - t) e: noise at t = 0, data at t = 1."""
    t = t[..., None, None]
    return t * bits + (1 - t) * noise


def velocity_loss(
    predicted: Float[Array, "*B P K"], bits: Float[Array, "*#B P K"], t: Float[Array, "*B"]
) -> Float[Array, "*B P K"]:
    """Squared error of the velocity (f - x_t) / max(1 - t, 0.05) of each element; x_t cancels."""
    return jnp.square((bits - predicted) / remaining_time(t)[..., None, None])


def guided_velocity(
    predict: Callable[[Float[Array, "R P K"], Int[Array, ""]], Float[Array, "R P K"]],
    times: Float[Array, "E"],
    guide: Guide | None,
) -> Velocity:
    """The velocity (f - x_t) / max(1 - t, 0.05) of one patch, with guidance.

    Args:
      predict: (x_t, number of the evaluation) -> the clean bits f.
      times: of the evaluations.
      guide: None without guidance.
    """
    remaining = remaining_time(times)
    if guide is None:
        return lambda x, i: (predict(x, i) - x) / remaining[i]
    # One array: accelerators launch a kernel for every one that a loop slices.
    numbers = jnp.stack([remaining, guide.scales], axis=1)

    def velocity(x: Float[Array, "R P K"], i: Int[Array, ""]) -> Float[Array, "R P K"]:
        left, scale = numbers[i]
        return guide((predict(x, i) - x) / left, scale)

    return velocity
