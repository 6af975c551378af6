"""A solver of your own: Adams and Bashforth's method of the second order.

    python examples/solver.py          # images of emoji_classes, in emoji.png

It takes one evaluation of the head a step, as Euler's method does, and reuses the last velocity.
Inside the package, this class and its name belong into `bitdance_jax/sampling/solvers.py`; no other
file has to know them.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import bitdance_jax
from bitdance_jax.config import SamplerConfig
from bitdance_jax.config.sampler import SOLVERS
from bitdance_jax.heads.flow_matching import shift_time
from bitdance_jax.heads.protocols import Velocity
from bitdance_jax.io import image_files


@dataclass(frozen=True)
class AdamsBashforth:
    """x <- x + dt ((1 + r / 2) v - r / 2 v_last) with r = dt / dt_last, on Euler's grid.

    The first step has no last velocity. The last step lands on the head's prediction. Both are
    Euler's.

    Attributes:
      num_steps: number of steps, and of evaluations.
      time_shift: of the head (`flow_matching.shift_time`).
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
        return self._grid()[:-1]

    def solve(self, velocity: Velocity, noise: Float[Array, "S R P K"]) -> Float[Array, "R P K"]:
        def step(carry: tuple[Array, Array], inputs: Any) -> tuple[tuple[Array, Array], None]:
            x, last = carry
            evaluation, dt, ratio = inputs
            here = velocity(x, evaluation)
            return (x + dt * (here + ratio / 2 * (here - last)), here), None

        dt = jnp.diff(self._grid())
        ratio = jnp.append(0.0, dt[1:] / dt[:-1]).at[-1].set(0.0)
        start = (noise[0], jnp.zeros_like(noise[0]))
        (x, _), _ = jax.lax.scan(step, start, (jnp.arange(self.num_steps), dt, ratio))
        return x

    def _grid(self) -> Float[Array, "points"]:
        return shift_time(jnp.linspace(0, 1, self.num_steps + 1), self.time_shift)


SOLVERS["adams_bashforth"] = AdamsBashforth


def main() -> None:
    model = bitdance_jax.load("emoji_classes")
    sampler = SamplerConfig(
        solver="adams_bashforth", head_steps=10, guidance_scale=3.5, guidance_schedule="constant"
    )
    images = model.sample([0, 1, 2, 3], seed=0, sampler=sampler)
    image_files.save_png("emoji.png", image_files.grid(images, columns=4))


if __name__ == "__main__":
    main()
