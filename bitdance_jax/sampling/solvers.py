"""Solvers of the head's flow (paper 3.2), from noise to the values before the sign of one patch.

The flow's velocity is v = (f - x) / max(1 - t, 0.05), with the head's prediction f. A solver is a
frozen dataclass, so that programs are compiled for it. A new one is a class like those here, called
with the number of steps and the head's time shift, and a name in `SOLVERS`.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitdance_jax.config import SamplerConfig
from bitdance_jax.config.sampler import SOLVERS
from bitdance_jax.heads.flow_matching import MIN_REMAINING, shift_time
from bitdance_jax.heads.protocols import Solver, Velocity
from bitdance_jax.sampling.multistep import Multistep


class Steps(NamedTuple):
    """The recurrence x <- keep x + move v + diffuse e with noise e, for every evaluation."""

    t: Float[Array, "E"]
    keep: Float[Array, "E"]
    move: Float[Array, "E"]
    diffuse: Float[Array, "E"]


def recur(
    steps: Steps, velocity: Velocity, noise: Float[Array, "S R P K"]
) -> Float[Array, "R P K"]:
    """The recurrence from noise[0]; the last E + 1 - S evaluations have no noise."""

    def step(x: Float[Array, "R P K"], inputs: Any) -> tuple[Float[Array, "R P K"], None]:
        evaluation, (keep, move, diffuse), fresh = inputs
        return keep * x + move * velocity(x, evaluation) + diffuse * fresh, None

    start = noise[0]
    fresh = noise[1:]
    count = steps.t.shape[0]
    idle = jnp.zeros((count - fresh.shape[0], *start.shape), start.dtype)
    # One array: accelerators launch a kernel for every one that a loop slices.
    numbers = jnp.stack(steps[1:], axis=1)
    x, _ = jax.lax.scan(step, start, (jnp.arange(count), numbers, jnp.concatenate([fresh, idle])))
    return x


@dataclass(frozen=True)
class Euler:
    """The paper's equation 4: N uniform steps from 0 to 1.

    Attributes:
      num_steps: N.
      time_shift: of the head (`objective.shift_time`).
    """

    num_steps: int
    time_shift: float = 1.0

    @property
    def num_evaluations(self) -> int:
        return self.num_steps

    @property
    def num_noises(self) -> int:
        return 1

    def times(self) -> Float[Array, "E"]:
        return self.steps().t

    def steps(self) -> Steps:
        grid = shift_time(jnp.linspace(0, 1, self.num_steps + 1), self.time_shift)
        t = grid[:-1]
        dt = jnp.diff(grid)
        return Steps(t, keep=jnp.ones_like(t), move=dt, diffuse=jnp.zeros_like(t))

    def solve(self, velocity: Velocity, noise: Float[Array, "S R P K"]) -> Float[Array, "R P K"]:
        return recur(self.steps(), velocity, noise)


@dataclass(frozen=True)
class EulerMaruyama:
    """As released: N steps on t = linspace(0, 0.95, N + 1) with drift (1 + t) v - x and noise
    sqrt(2 (1 - t) dt), then one Euler step of 0.05 at t = 0.95, which lands on the prediction.

    Attributes:
      num_steps: N; N + 1 evaluations.
      time_shift: of the head (`objective.shift_time`).
    """

    num_steps: int
    time_shift: float = 1.0

    @property
    def num_evaluations(self) -> int:
        return self.num_steps + 1

    @property
    def num_noises(self) -> int:
        return self.num_steps + 1

    def times(self) -> Float[Array, "E"]:
        return self.steps().t

    def steps(self) -> Steps:
        grid = shift_time(jnp.linspace(0, 1 - MIN_REMAINING, self.num_steps + 1), self.time_shift)
        t = grid[:-1]
        dt = jnp.diff(grid)
        diffusing = Steps(t, keep=1 - dt, move=(1 + t) * dt, diffuse=jnp.sqrt(2 * (1 - t) * dt))
        last = (1 - MIN_REMAINING, 1.0, MIN_REMAINING, 0.0)
        pairs = zip(diffusing, last, strict=True)
        return Steps(*(jnp.append(numbers, jnp.float32(number)) for numbers, number in pairs))

    def solve(self, velocity: Velocity, noise: Float[Array, "S R P K"]) -> Float[Array, "R P K"]:
        return recur(self.steps(), velocity, noise)


@dataclass(frozen=True)
class Heun:
    """Heun's method of the second order on Euler's grid, two evaluations a step.

    The last step is Euler's: it lands on the prediction, where the velocity at t = 1 would not.

    Attributes:
      num_steps: N; 2 N - 1 evaluations.
      time_shift: of the head (`objective.shift_time`).
    """

    num_steps: int
    time_shift: float = 1.0

    @property
    def num_evaluations(self) -> int:
        return 2 * self.num_steps - 1

    @property
    def num_noises(self) -> int:
        return 1

    def times(self) -> Float[Array, "E"]:
        """Both ends of every step but the last one's."""
        return jnp.repeat(self._grid()[:-1], 2)[1:]

    def solve(self, velocity: Velocity, noise: Float[Array, "S R P K"]) -> Float[Array, "R P K"]:
        # Predictor and corrector alternate in one loop. It carries the point and the velocity of
        # the last evaluation, which the corrector needs.
        def evaluate(carry: tuple[Array, Array, Array], inputs: Any) -> tuple[Any, None]:
            x, start, slope = carry
            evaluation, dt = inputs
            here = velocity(x, evaluation)
            predicted = x + dt * here
            corrected = start + dt / 2 * (slope + here)
            return (jnp.where(evaluation % 2 == 1, corrected, predicted), x, here), None

        count = self.num_evaluations
        dt = jnp.repeat(jnp.diff(self._grid()), 2)[:count]
        (x, _, _), _ = jax.lax.scan(evaluate, (noise[0],) * 3, (jnp.arange(count), dt))
        return x

    def _grid(self) -> Float[Array, "T"]:
        return shift_time(jnp.linspace(0, 1, self.num_steps + 1), self.time_shift)


SOLVERS |= {
    "euler_maruyama": EulerMaruyama,
    "euler": Euler,
    "heun": Heun,
    "multistep_sde": Multistep,
    "multistep_ode": functools.partial(Multistep, stochastic=False),
}


def make_solver(config: SamplerConfig, time_shift: float | None) -> Solver:
    """The solver that a config names.

    Args:
      config: see there.
      time_shift: `HeadConfig.time_shift`; None: one evaluation, whatever the config says.
    """
    if time_shift is None:
        return Euler(num_steps=1)
    return SOLVERS[config.solver](config.head_steps, time_shift)
