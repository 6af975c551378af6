"""Line charts of a run's metrics, plotted from its metrics.csv."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import UInt8

from bitdance_jax.io import plot


HELD_OUT = "eval_"
"""Prefix of the metrics of held-out records."""

TITLES = {
    "loss": "loss",
    "psnr": "PSNR of reconstructions, dB",
    "ssim": "SSIM of reconstructions",
    "rfid": "rFID of the held-out images",
    "perceptual": "perceptual distance of reconstructions",
    "bits_used": "share of bits that take both values",
    "bit_balance": "balance of bits, 1: half of them are +1",
    "l1": "mean absolute error of pixels from -1 to 1",
    "l2": "mean squared error of pixels from -1 to 1",
    "kl": "divergence of the latents, nats for each number of an image",
    "latent_std": "standard deviation of the latents",
    "sample_entropy": "entropy of an image's codes, nats",
    "codebook_entropy": "entropy of the codebook, nats",
    "grad_norm": "norm of the gradient, before clipping",
    "learning_rate": "learning rate",
}
"""Titles of metrics, with their units; the title of any other is its name."""

FIRST = ("loss", "psnr")
LAST = ("grad_norm", "learning_rate")
COLUMNS = 2


def plot_curves(rows: Iterable[Mapping[str, str]]) -> UInt8[np.ndarray, "H W 3"]:
    """A chart of each metric over the steps, the loss first, with training and held-out values.

    Args:
      rows: of `metrics.csv`, as text; missing values and values that are not finite are skipped.
    """
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    last = 0
    for row in rows:
        last = int(row["step"])
        for name, text in row.items():
            if name in ("step", "epoch") or not text or not math.isfinite(value := float(text)):
                continue
            metric = name.removeprefix(HELD_OUT)
            training = "" if name in LAST else "training, one step"
            label = training if metric == name else "held-out images, EMA weights"
            lines.setdefault(metric, {}).setdefault(label, []).append((float(row["step"]), value))
    panels = [
        plot.Panel("step", lines[name], TITLES.get(name, name.replace("_", " ")))
        for name in sorted(lines, key=_rank)
    ]
    if not panels:
        return np.full((plot.HEIGHT, plot.WIDTH, 3), 255, np.uint8)
    return plot.line_charts(f"{last:,} steps", panels, columns=COLUMNS)


def _rank(name: str) -> int:
    """Position of a metric's chart; metrics without a fixed position keep their order."""
    if name in FIRST:
        return FIRST.index(name) - len(FIRST)
    return 1 + LAST.index(name) if name in LAST else 0
