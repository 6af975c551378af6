"""Histograms of what the head predicts, over the time of its flow (as the paper's figure 9).

    python examples/head_output.py                       # emoji_classes, head_output.png
    python examples/head_output.py --checkpoint models/b_1x --inputs 207 360

A prediction near -1 or 1 is a decided bit. The predictions are those on the way of images that are
sampled: with a guidance scale of 1 the head's raw output, else the guided one. It works for any
model, head and solver: the solver is wrapped, and reports what passes through it.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import bitdance_jax
from bitdance_jax.config.sampler import SOLVERS
from bitdance_jax.heads.flow_matching import MIN_REMAINING
from bitdance_jax.heads.protocols import Solver, Velocity
from bitdance_jax.io import image_files, plot
from bitdance_jax.pipelines.pipeline import Pipeline


LIMIT = 1.5
BINS = 60
DECIDED = 0.9
LINES = 6


class Histograms:
    """Counts of predictions by value, for every evaluation of a solver.

    Attributes:
      counts: [E, BINS]; the first and last bin have what is beyond `LIMIT`.
      times: of the evaluations, [E].
    """

    def __init__(self) -> None:
        self.counts = np.zeros((0, BINS), np.int64)
        self.times = np.zeros(0)

    def start(self, times: Float[Array, "E"]) -> None:
        """Called before the first prediction."""
        if not len(self.times):
            self.times = np.asarray(times)
            self.counts = np.zeros((len(self.times), BINS), np.int64)

    def add(self, counts: Int[np.ndarray, "BINS"], evaluation: Int[np.ndarray, ""]) -> None:
        self.counts[int(evaluation)] += np.asarray(counts)


@dataclass(frozen=True)
class Recording:
    """A solver that reports the predictions f = x + max(1 - t, 0.05) v of another one.

    Attributes:
      solver: which solves.
      histograms: where they are counted.
    """

    solver: Solver
    histograms: Histograms

    @property
    def num_evaluations(self) -> int:
        return self.solver.num_evaluations

    @property
    def num_noises(self) -> int:
        return self.solver.num_noises

    def times(self) -> Float[Array, "E"]:
        return self.solver.times()

    def solve(self, velocity: Velocity, noise: Float[Array, "S R P K"]) -> Float[Array, "R P K"]:
        times = self.times()

        def recorded(x: Float[Array, "R P K"], evaluation: Int[Array, ""]) -> Any:
            v = velocity(x, evaluation)
            prediction = x + jnp.maximum(1 - times[evaluation], MIN_REMAINING) * v
            inside = jnp.clip(prediction, -LIMIT, LIMIT)
            counts, _ = jnp.histogram(inside, bins=BINS, range=(-LIMIT, LIMIT))
            jax.debug.callback(self.histograms.add, counts.astype(jnp.int32), evaluation)
            return v

        return self.solver.solve(recorded, noise)


def record(
    model: Pipeline,
    inputs: Sequence[Any],
    sampler: bitdance_jax.SamplerConfig,
    *,
    seed: int,
    images_per_input: int,
) -> Histograms:
    """The histograms of some images' sampling."""
    histograms = Histograms()
    inner = SOLVERS[sampler.solver]

    def make(num_steps: int, time_shift: float) -> Recording:
        solver = inner(num_steps, time_shift)
        histograms.start(solver.times())
        return Recording(solver, histograms)

    SOLVERS["recording"] = make
    try:
        recording = dataclasses.replace(sampler, solver="recording")
        model.sample(
            inputs, seed=seed, images_per_input=images_per_input, sampler=recording, output="codes"
        )
        jax.effects_barrier()
    finally:
        del SOLVERS["recording"]
    return histograms


def figure(histograms: Histograms, title: str) -> np.ndarray:
    """Densities at some of the times, and the share of decided bits over all; uint8 [H, W, 3]."""
    edges = np.linspace(-LIMIT, LIMIT, BINS + 1)
    centres = (edges[1:] + edges[:-1]) / 2
    density = histograms.counts / histograms.counts.sum(axis=1, keepdims=True) / np.diff(edges)
    chosen = np.unique(np.linspace(0, len(density) - 1, LINES).round().astype(int))
    lines = {f"t = {histograms.times[row]:.2f}": points(centres, density[row]) for row in chosen}
    decided = (density * np.diff(edges))[:, np.abs(centres) > DECIDED].sum(axis=1)
    panels = [
        plot.Panel("prediction", lines, "density of the head's predictions"),
        plot.Panel(
            "time t",
            {"": points(histograms.times, decided)},
            f"share of predictions beyond {DECIDED} of either sign",
        ),
    ]
    return plot.line_charts(title, panels, columns=2)


def points(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    return list(zip(x.tolist(), y.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="emoji_classes")
    parser.add_argument("--inputs", nargs="+", default=None, help="labels or prompts")
    parser.add_argument("--images-per-input", type=int, default=4)
    parser.add_argument("--head-steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="head_output.png")
    arguments = parser.parse_args()
    model = bitdance_jax.load(arguments.checkpoint)
    inputs = arguments.inputs
    if inputs is None and not isinstance(model, bitdance_jax.ClassConditionalPipeline):
        parser.error("--inputs: give prompts")
    inputs = list(model.class_names[:4]) if inputs is None else inputs
    sampler = dataclasses.replace(
        model.sampler, head_steps=arguments.head_steps, guidance_scale=arguments.guidance_scale
    )
    histograms = record(
        model,
        inputs,
        sampler,
        seed=arguments.seed,
        images_per_input=arguments.images_per_input,
    )
    title = f"{arguments.checkpoint}, guidance {sampler.guidance_scale:g}, {sampler.solver}"
    image_files.save_png(arguments.out, figure(histograms, title))
    print(
        f"{histograms.counts.sum():,} predictions at {len(histograms.times)} times; "
        f"figure in {arguments.out}"
    )


if __name__ == "__main__":
    main()
