"""Training the head (paper 3.2): noisy bits on straight lines between noise and data, and the velocity loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitdance_jax.config import FlowHeadConfig


MIN_REMAINING = 0.05
"""Velocities divide by the time left, max(1 - t, 0.05)."""


def remaining_time(t: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return jnp.maximum(1 - t, MIN_REMAINING)


def shift_time(t: Float[Array, "*B"], shift: float) -> Float[Array, "*B"]:
    """t <- (1/s) / (1/s + 1/t - 1), written so that t = 0 stays 0."""
    return t / (t + shift * (1 - t))


def training_times(normal: Float[Array, "*B"], config: FlowHeadConfig) -> Float[Array, "*B"]:
    """Training times from standard normal draws: logit-normal, or uniform through the normal's distribution function; then shifted."""
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
    """Squared error of the velocity (f - x_t) / max(1 - t, 0.05), element by element; x_t cancels."""
    return jnp.square((bits - predicted) / remaining_time(t)[..., None, None])
