"""Solvers of the head whose steps are data: one compiled program serves all of them.

They sample images, or patches after given ones, where two solvers can share the path of the noise.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bitdance_jax.heads.flow_matching import remaining_time
from bitdance_jax.heads.protocols import Solver, Velocity
from bitdance_jax.sampling import multistep, next_patch
from bitdance_jax.sampling.guidance import PatchGuidance
from bitdance_jax.sampling.multistep import PredictionSteps


class Tabulated(NamedTuple):
    """A solver whose steps and their number are data: one program serves all settings.

    Attributes:
      steps: of M evaluations, those that are used first.
      used: how many are used.
      mixing: the noise of each step as a sum of S - 1 noises; None: each has its own.
    """

    steps: PredictionSteps
    used: Int[Array, ""]
    mixing: Float[Array, "M S1"] | None = None

    @property
    def num_evaluations(self) -> int:
        return self.steps.t.shape[0]

    @property
    def num_noises(self) -> int:
        return 1 + (self.num_evaluations if self.mixing is None else self.mixing.shape[1])

    def times(self) -> Float[Array, "M"]:
        return self.steps.t

    def solve(self, velocity: Velocity, noise: Float[Array, "S R P K"]) -> Float[Array, "R P K"]:
        remaining = remaining_time(self.steps.t)
        numbers = jnp.stack(self.steps[1:], axis=1)

        def step(i: Int[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
            x, last = carry
            prediction = x + remaining[i] * velocity(x, i)
            fresh = (
                noise[1:][i] if self.mixing is None else jnp.tensordot(self.mixing[i], noise[1:], 1)
            )
            return multistep.advance(x, last, prediction, numbers[i], fresh), prediction

        return jax.lax.fori_loop(0, self.used, step, (noise[0], jnp.zeros_like(noise[0])))[0]


def prediction_steps(solver: Solver) -> PredictionSteps:
    """The steps of a solver of the package in terms of predictions."""
    steps: Any = solver.steps()  # type: ignore[attr-defined]
    if isinstance(steps, PredictionSteps):
        return steps
    # move v with v = (f - x) / remaining
    move = steps.move / remaining_time(steps.t)
    return PredictionSteps(steps.t, steps.keep - move, move, jnp.zeros_like(move), steps.diffuse)


def tabulated(solver: Solver, capacity: int) -> Tabulated:
    """A solver of the package, for programs of `capacity` evaluations."""
    steps = prediction_steps(solver)
    unused = capacity - len(steps.t)
    return Tabulated(
        jax.tree.map(lambda array: jnp.pad(array, (0, unused)), steps),
        jnp.int32(len(steps.t)),
    )


def stopped_after(solver: Tabulated, evaluations: int) -> Tabulated:
    """The first evaluations of a solver, of which the last one's prediction is the result."""
    last = evaluations - 1
    numbers = {"keep": 0.0, "move": 1.0, "turn": 0.0, "diffuse": 0.0}
    changed = {
        name: getattr(solver.steps, name).at[last].set(number) for name, number in numbers.items()
    }
    return solver._replace(steps=solver.steps._replace(**changed), used=jnp.int32(evaluations))


def mixing(
    times: Float[np.ndarray, "E"], fine: Float[np.ndarray, "F"]
) -> Float[np.ndarray, "E F2"]:
    """The noise of each step as a sum of 2 F noises: those of the fine steps, and others.

    The path of the noise is that of the fine steps. Where two steps share a fine one, its path is
    a Brownian bridge between the two ends, which takes the other noise.

    Args:
      times: of the evaluations, each the start of a step; the last one ends at 1.
      fine: the same of the fine steps.
    """
    end, fine_end = (np.append(start[1:], 1.0) for start in (times, fine))
    length = (fine_end - fine).clip(1e-6)
    overlap = np.minimum(end[:, None], fine_end) - np.maximum(times[:, None], fine)
    overlap = overlap.clip(0, length)
    bridge = np.sqrt(overlap * (length - overlap)) * np.where(times[:, None] > fine, -1, 1)
    weights = np.concatenate([overlap, bridge], axis=1) / np.sqrt(np.tile(length, 2))
    return weights / np.linalg.norm(weights, axis=1, keepdims=True).clip(1e-6)


def draw(
    read: Any, params: Any, inputs: Any, keys: Any, scales: Any, solver: Tabulated
) -> Float[Array, "N B P K"]:
    """Values of all patches."""
    reader = read(params, inputs, scales)
    noise = next_patch.noise_of_images(reader, jax.random.wrap_key_data(keys), solver)
    return next_patch.sample(reader, noise=noise, solver=solver, scales=scales)


def redraw(
    read: Any,
    params: Any,
    inputs: Any,
    keys: Any,
    scales: Any,
    solver: Tabulated,
    values: Float[Array, "N B P K"],
) -> Float[Array, "N B P K"]:
    """New values of all patches, each after the given values of the preceding ones."""
    reader = read(params, inputs, scales)
    noise = next_patch.noise_of_images(reader, jax.random.wrap_key_data(keys), solver)
    streams = next_patch.num_streams(scales, None)
    prepared = reader.head.prepare(solver)

    def step(cache: Any, patch: Int[Array, ""]) -> tuple[Any, Float[Array, "B P K"]]:
        before = jnp.tile(values[jnp.maximum(patch - 1, 0)], (streams, 1, 1))
        states, cache = reader.read(before, patch, cache)
        guide = None
        if scales is not None:
            guide = PatchGuidance(jnp.asarray(scales)[patch], jnp.bool_(False))
        fresh = jnp.tile(noise(patch, None), (1, streams, 1, 1))
        drawn = reader.head.sample(states, fresh, prepared, solver=solver, guide=guide)
        return cache, drawn[: values.shape[1]]

    _, redrawn = jax.lax.scan(step, reader.read_prefix(), jnp.arange(len(values)))
    return redrawn
