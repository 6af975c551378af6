"""Where a run's figures go: `metrics.csv`, TensorBoard, images and a drawing of the curves."""

import itertools
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from bitdance_jax.io import image_files, readers
from bitdance_jax.io.atomic import remove_temporary_files, replace_file
from bitdance_jax.train.curves import draw_curves


class MetricsFile:
    """A CSV table with one row a logged step. The same run writes the same file, resumed or not.

    Opening drops the rows after `last_step` (0 drops all), and a last line that a kill left incomplete. A figure that appears later than
    the first row becomes a new column, empty in the rows before it.

    Other lines that no run has written are left out too. Then the file as it was is kept beside it, and
    a line on stderr names it.

    Raises:
      UserError: the file cannot be read or written.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self._path = path
        self.rows: list[dict[str, str]] = []
        if path.exists():
            rows, altered = _read(path)
            if altered:
                _keep_aside(path)
            self.rows = [row for row in rows if int(row["step"]) <= last_step]
        self._columns = list(self.rows[0]) if self.rows else []
        self._rewrite()

    def append(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds a row. Floats are written so that they read back exactly."""
        self.rows.append(
            {"step": str(step), **{name: repr(value) for name, value in figures.items()}}
        )
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
        with replace_file(self._path) as temporary:
            temporary.write_text(header + "".join(map(self._line, self.rows)))


def _read(path: Path) -> tuple[list[dict[str, str]], bool]:
    """The rows of a table, and whether there is anything else in it but a last line that is not whole."""
    text = Path(readers.check_file(path)).read_bytes().decode(errors="replace")
    *lines, rest = text.split("\n")
    columns = (lines or [rest])[0].split(",")
    if columns[0] != "step" or len(set(columns)) < len(columns):
        return [], bool(text)
    rows = [row for line in lines[1:] if (row := _row(columns, line))]
    return rows, len(rows) < len(lines) - 1


def _row(columns: list[str], line: str) -> dict[str, str] | None:
    """A line of a table, None if it is none: a number in each column, or nothing, and a step in the first."""
    cells = line.split(",")
    try:
        int(cells[0])
        [float(cell) for cell in cells if cell]
    except ValueError:
        return None
    return dict(zip(columns, cells, strict=True)) if len(cells) == len(columns) else None


def _keep_aside(path: Path) -> None:
    asides = itertools.chain([".damaged"], (f".damaged_{number}" for number in itertools.count(2)))
    aside = next(
        path.with_name(path.name + ending)
        for ending in asides
        if not path.with_name(path.name + ending).exists()
    )
    with replace_file(aside) as temporary:
        shutil.copyfile(path, temporary)
    tqdm.write(
        f"{path} is damaged; it is kept as {aside}, and lines that no run wrote are left out",
        file=sys.stderr,
    )


class MetricsWriter:
    """Writes figures and images into a run's folder. What a killed process left there of a file goes."""

    def __init__(self, workdir: Path, last_step: int) -> None:
        self._workdir = workdir
        remove_temporary_files(workdir, recursive=False)
        remove_temporary_files(workdir / "images")
        self._table = MetricsFile(workdir / "metrics.csv", last_step)
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=last_step + 1)

    def write(
        self, step: int, figures: Mapping[str, float], performance: Mapping[str, float]
    ) -> None:
        """Logs a step. Speed and memory go to TensorBoard only: metrics.csv holds what a resumed run repeats exactly."""
        self._table.append(step, figures)
        for name, value in {**figures, **performance}.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes images/NAME_STEP.png for each uint8 [H, W, 3] image, and draws curves.png anew."""
        for name, image in images.items():
            image_files.save_png(self._workdir / "images" / f"{name}_{step:07d}.png", image)
            self._tensorboard.add_image(name, image, step, dataformats="HWC")
        image_files.save_png(self._workdir / "curves.png", draw_curves(self._table.rows))

    def close(self) -> None:
        self._tensorboard.close()
