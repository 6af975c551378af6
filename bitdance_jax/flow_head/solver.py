"""Sampling the head (paper 3.2): from noise to the bits of one patch.

Both solvers are the same recurrence x <- a x + b v + c e with v = (f - x) / max(1 - t, 0.05) and fresh normal noise e:

- "euler_maruyama", as released: N steps on t = linspace(0, 0.95, N + 1) with drift (1 + t) v - x and noise sqrt(2 (1 - t) dt), then one
  Euler step of 0.05 at t = 0.95, which lands on the prediction f. N + 1 evaluations.
- "euler", the paper's equation 4: N uniform steps from 0 to 1. N evaluations.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bitdance_jax.config import SamplerConfig
from bitdance_jax.flow_head.objective import MIN_REMAINING, remaining_time, shift_time


class Steps(NamedTuple):
    """The recurrence's times and coefficients, one entry for each evaluation of the head: [E] each."""

    t: Float[Array, "E"]
    keep: Float[Array, "E"]
    move: Float[Array, "E"]
    diffuse: Float[Array, "E"]


def solver_steps(config: SamplerConfig, time_shift: float = 1.0) -> Steps:
    """Times and coefficients of a solver; the last step never diffuses."""
    if config.solver == "euler":
        grid = shift_time(jnp.linspace(0, 1, config.head_steps + 1), time_shift)
        t, dt = grid[:-1], jnp.diff(grid)
        return Steps(t, jnp.ones_like(t), dt, jnp.zeros_like(t))
    grid = shift_time(jnp.linspace(0, 1 - MIN_REMAINING, config.head_steps + 1), time_shift)
    t, dt = grid[:-1], jnp.diff(grid)
    last = Steps(*(jnp.array([value], jnp.float32) for value in (1 - MIN_REMAINING, 1.0, MIN_REMAINING, 0.0)))
    diffusing = Steps(t, 1 - dt, (1 + t) * dt, jnp.sqrt(2 * (1 - t) * dt))
    return Steps(*(jnp.concatenate(pair) for pair in zip(diffusing, last, strict=True)))


def num_evaluations(config: SamplerConfig) -> int:
    """How often the head is evaluated for one patch."""
    return config.head_steps + (1 if config.solver == "euler_maruyama" else 0)


def num_noises(config: SamplerConfig) -> int:
    """Noises that one patch takes: the starting point, then one for each diffusing step."""
    return 1 + (config.head_steps if config.solver == "euler_maruyama" else 0)


def guidance_scales(config: SamplerConfig, num_steps: int) -> np.ndarray:
    """s_i of every autoregressive step, float32 [num_steps]: constant, or linear 1 + (s - 1) i / num_steps."""
    share = np.arange(num_steps) / num_steps if config.guidance_schedule == "linear" else np.ones(num_steps)
    return (1 + (config.guidance_scale - 1) * share).astype(np.float32)


def guide(velocity: Float[Array, "R P K"], scale: Float[Array, ""] | float) -> Float[Array, "B P K"]:
    """v_u + s (v_c - v_u) of rows [conditional; unconditional], R = 2 B."""
    conditional, unconditional = jnp.split(velocity, 2)
    return unconditional + scale * (conditional - unconditional)


def solve(
    predict: Callable[[Float[Array, "R P K"], Any], Float[Array, "R P K"]],
    noise: Float[Array, "S B P K"],
    steps: Steps,
    inputs: Any,
    scale: Float[Array, ""] | float | None,
) -> Float[Array, "B P K"]:
    """Values whose signs are the bits of one patch.

    Args:
      predict: the head, given one evaluation's part of `inputs`. With guidance it gets the shared sample twice, R = 2 B rows.
      noise: `num_noises` standard normal draws; the first is the starting point.
      steps: `solver_steps`.
      inputs: arrays [E, ...], the evaluations' own: time embeddings, or what is made of them.
      scale: guidance scale of this patch, or None for a sample for each row.
    """

    def step(x: Float[Array, "B P K"], parts: tuple[Array, Any, Array]) -> tuple[Float[Array, "B P K"], None]:
        numbers, own, fresh = parts
        at = Steps(*numbers)
        rows = x if scale is None else jnp.concatenate([x, x])
        velocity = (predict(rows, own) - rows) / remaining_time(at.t)
        if scale is not None:
            velocity = guide(velocity, scale)
        return at.keep * x + at.move * velocity + at.diffuse * fresh, None

    start, fresh = noise[0], noise[1:]
    idle = steps.t.shape[0] - fresh.shape[0]
    fresh = jnp.concatenate([fresh, jnp.zeros((idle, *start.shape), start.dtype)])
    # One array for the numbers of a step: accelerators launch a kernel for every one that a loop slices.
    x, _ = jax.lax.scan(step, start, (jnp.stack(steps, axis=1), inputs, fresh))
    return x
