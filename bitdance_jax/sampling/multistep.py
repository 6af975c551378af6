"""A multistep solver of the second order, of the released SDE or of the flow's ODE.

Both move a patch through the same distributions: the ODE by dx = v dt, the SDE, of which the
release takes Euler-Maruyama steps, by dx = ((1 + t) v - x) dt + sqrt(2 (1 - t)) dw. For a constant
prediction f, with r = (1 - t') / (1 - t), the exact step from t to t' is

    ODE: x' = r x  + (1 - r) f
    SDE: x' = r² x + (t' - r² t) f + (1 - t') sqrt(1 - r²) e

As in DPM-Solver++(2M) (arXiv 2211.01095), the prediction is extrapolated linearly from the last
two evaluations, and the integral of that is exact, too.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bitdance_jax.heads.flow_matching import MIN_REMAINING, remaining_time, shift_time
from bitdance_jax.heads.protocols import Velocity


class PredictionSteps(NamedTuple):
    """The recurrence x <- keep x + move f + turn (f - f_last) + diffuse e, for every evaluation.

    f is the prediction, f_last that of the evaluation before, e standard normal noise.
    """

    t: Float[Array, "E"]
    keep: Float[Array, "E"]
    move: Float[Array, "E"]
    turn: Float[Array, "E"]
    diffuse: Float[Array, "E"]


@dataclass(frozen=True)
class Multistep:
    """N evaluations at equal distances; the last step is twice as long, or starts at t = 0.95.

    Late evaluations change no bit: there the bits are already far from 0.

    Attributes:
      num_steps: N.
      time_shift: of the head (`objective.shift_time`).
      stochastic: the SDE, or the ODE.
    """

    num_steps: int
    time_shift: float = 1.0
    stochastic: bool = True

    @property
    def num_evaluations(self) -> int:
        return self.num_steps

    @property
    def num_noises(self) -> int:
        return self.num_steps if self.stochastic else 1

    def times(self) -> Float[Array, "E"]:
        return self.steps().t

    def steps(self) -> PredictionSteps:
        last = min(1 - 2 / (self.num_steps + 1), 1 - MIN_REMAINING)
        with jax.ensure_compile_time_eval():
            t = np.asarray(
                shift_time(jnp.linspace(0, last, self.num_steps), self.time_shift), np.float64
            )
        return prediction_steps(t, self.stochastic)

    def solve(self, velocity: Velocity, noise: Float[Array, "S R P K"]) -> Float[Array, "R P K"]:
        steps = self.steps()
        remaining = remaining_time(steps.t)

        def step(carry: tuple[Array, Array], inputs: Any) -> tuple[tuple[Array, Array], None]:
            x, last = carry
            evaluation, numbers, fresh = inputs
            prediction = x + remaining[evaluation] * velocity(x, evaluation)
            return (advance(x, last, prediction, numbers, fresh), prediction), None

        start = noise[0]
        idle = jnp.zeros((self.num_steps + 1 - len(noise), *start.shape), start.dtype)
        # One array: accelerators launch a kernel for every one that a loop slices.
        numbers = jnp.stack(steps[1:], axis=1)
        inputs = (jnp.arange(self.num_steps), numbers, jnp.concatenate([noise[1:], idle]))
        (x, _), _ = jax.lax.scan(step, (start, jnp.zeros_like(start)), inputs)
        return x


def prediction_steps(t: Float[np.ndarray, "E"], stochastic: bool) -> PredictionSteps:
    """Steps from the time of each evaluation to that of the next, and from the last one to 1.

    The first step has no last prediction. The last one lands on the prediction.
    """
    end = np.append(t[1:], 1.0)
    r = (1 - end) / (1 - t)
    # The integral of the kernel times (t - start of the step); the limit of x log x at 0 is 0.
    log_r = np.log(np.where(r > 0, r, 1.0))
    if stochastic:
        keep = r**2
        integral = end * (end - t) - (1 - end) * (1 - r) - (1 - end) ** 2 * log_r
        diffuse = (1 - end) * np.sqrt(1 - r**2)
    else:
        keep = r
        integral = end - t + (1 - end) * log_r
        diffuse = np.zeros_like(r)
    turn = np.zeros_like(r)
    turn[1:-1] = (integral[1:] / np.diff(t))[:-1]
    tables = (t, keep, end - keep * t, turn, diffuse)
    return PredictionSteps(*(jnp.asarray(table, jnp.float32) for table in tables))


def advance(
    x: Float[Array, "R P K"],
    last: Float[Array, "R P K"],
    prediction: Float[Array, "R P K"],
    step: Float[Array, "4"],
    noise: Float[Array, "R P K"],
) -> Float[Array, "R P K"]:
    """x after one step of `PredictionSteps`, whose coefficients behind t are `step`."""
    keep, move, turn, diffuse = step
    return keep * x + move * prediction + turn * (prediction - last) + diffuse * noise
