"""Where a run's figures go: `metrics.csv`, TensorBoard, pictures and a drawing of the curves."""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tensorboardX import SummaryWriter

from bitdance_jax import images
from bitdance_jax.files import replacing


class MetricsFile:
    """A CSV table with one row a logged step. The same run writes the same file, resumed or not.

    Opening drops the rows after `last_step` (0 drops all), and a last line that a kill left incomplete. A figure that appears later than
    the first row becomes a new column, empty in the rows before it.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self._path = path
        self.rows: list[dict[str, str]] = []
        if path.exists():
            text = path.read_text()
            lines = text[: text.rfind("\n") + 1].splitlines()
            self.rows = [row for row in csv.DictReader(lines) if int(row["step"]) <= last_step]
        self._columns = list(self.rows[0]) if self.rows else []
        self._rewrite()

    def append(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds a row. Floats are written so that they read back exactly."""
        self.rows.append({"step": str(step), **{name: repr(value) for name, value in figures.items()}})
        new = [name for name in self.rows[-1] if name not in self._columns]
        self._columns += new
        if new:
            self._rewrite()
        else:
            with self._path.open("a") as file:
                file.write(self._line(self.rows[-1]))

    def _line(self, row: dict[str, str]) -> str:
        return ",".join(row.get(name, "") for name in self._columns) + "\n"

    def _rewrite(self) -> None:
        header = ",".join(self._columns) + "\n" if self._columns else ""
        with replacing(self._path) as temporary:
            temporary.write_text(header + "".join(map(self._line, self.rows)))


class MetricsWriter:
    """Writes figures and pictures into a run's folder."""

    def __init__(self, workdir: Path, last_step: int) -> None:
        self._workdir = workdir
        self._table = MetricsFile(workdir / "metrics.csv", last_step)
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=last_step + 1)

    def write(self, step: int, figures: Mapping[str, float], performance: Mapping[str, float]) -> None:
        """Logs a step. Speed and memory go to TensorBoard only: metrics.csv holds what a resumed run repeats exactly."""
        self._table.append(step, figures)
        for name, value in {**figures, **performance}.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()

    def write_pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Writes pictures/NAME_STEP.png for each uint8 [H, W, 3] picture, and draws curves.png anew."""
        for name, picture in pictures.items():
            images.save_png(self._workdir / "pictures" / f"{name}_{step:07d}.png", picture)
            self._tensorboard.add_image(name, picture, step, dataformats="HWC")
        images.save_png(self._workdir / "curves.png", np.asarray(draw_curves(self._table.rows)))

    def close(self) -> None:
        self._tensorboard.close()


def draw_curves(rows: list[dict[str, str]], width: int = 640, height: int = 160) -> Image.Image:
    """Every column of a metrics table over the steps: one panel each, with its range and last value in the title."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("step", "epoch")]
    sheet = Image.new("RGB", (width, height * max(len(names), 1)), "white")
    draw = ImageDraw.Draw(sheet)
    for panel, name in enumerate(names):
        points = np.array([(float(row["step"]), float(row[name])) for row in rows if row.get(name)])
        points = points[np.isfinite(points[:, 1])]
        if not len(points):
            continue
        (low_x, low), (high_x, high) = points.min(0), points.max(0)
        x = 10 + (points[:, 0] - low_x) / max(high_x - low_x, 1) * (width - 20)
        y = (panel + 1) * height - 10 - (points[:, 1] - low) / max(high - low, 1e-12) * (height - 40)
        title = f"{name}: {low:.4g} to {high:.4g}, last {points[-1, 1]:.4g} at step {int(points[-1, 0])}"
        draw.text((10, panel * height + 6), title, fill="black")
        draw.line([(float(a), float(b)) for a, b in zip(x, y, strict=True)], fill=(31, 119, 180), width=2)
    return sheet
