"""The curves of a run, drawn from its table of metrics."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import UInt8

from bitdance_jax.io import plot


HELD_OUT = "eval_"
"""How the names of figures begin that are of held-out images."""

TITLES = {
    "loss": "loss",
    "psnr": "PSNR of reconstructions, dB",
    "l1": "mean absolute error of pixels from -1 to 1",
    "l2": "mean squared error of pixels from -1 to 1",
    "sample_entropy": "entropy of an image's codes, nats",
    "codebook_entropy": "entropy of the codebook, nats",
    "grad_norm": "norm of the gradient, before clipping",
    "learning_rate": "learning rate",
}
"""What a figure is, with its unit; those that are not here have none, and are called by their name."""

FIRST, LAST = ("loss", "psnr"), ("grad_norm", "learning_rate")
COLUMNS = 2


def draw_curves(rows: Iterable[Mapping[str, str]]) -> UInt8[np.ndarray, "H W 3"]:
    """A chart for each figure over the steps, the loss first; training and held-out images in one.

    Args:
      rows: of `metrics.csv`, as text; what is missing, or no finite number, is left out.
    """
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    last = 0
    for row in rows:
        last = int(row["step"])
        for name, text in row.items():
            if name in ("step", "epoch") or not text or not math.isfinite(value := float(text)):
                continue
            figure = name.removeprefix(HELD_OUT)
            trained = "" if name in LAST else "training, of that step"
            of = trained if figure == name else "held-out images, averaged weights"
            lines.setdefault(figure, {}).setdefault(of, []).append((float(row["step"]), value))
    panels = [
        plot.Panel("step", lines[name], TITLES.get(name, name.replace("_", " ")))
        for name in sorted(lines, key=_rank)
    ]
    if not panels:
        return np.full((plot.HEIGHT, plot.WIDTH, 3), 255, np.uint8)
    return plot.line_charts(f"{last:,} steps", panels, columns=COLUMNS)


def _rank(name: str) -> int:
    """Place of a figure's chart; figures that are not known keep their order between the others."""
    if name in FIRST:
        return FIRST.index(name) - len(FIRST)
    return 1 + LAST.index(name) if name in LAST else 0
