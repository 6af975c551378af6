"""Writes the metrics of a run: `metrics.csv`, TensorBoard, images and line charts."""

import itertools
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from bitdance_jax.io import image_files, readers
from bitdance_jax.io.atomic import remove_temporary_files, replace_file
from bitdance_jax.train.curves import plot_curves


class MetricsFile:
    """A CSV table with one row per logged step. A resumed run writes the same file.

    Opening it drops the rows after `last_step` (0 drops all) and an incomplete last line. A metric
    that first appears in a later row becomes a new column, empty in the rows before.

    Other lines that are not rows are dropped too. Then a copy of the file is stored beside it, and
    stderr names it.

    Raises:
      UserError: the file cannot be read or written.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self._path = path
        self.rows: list[dict[str, str]] = []
        if path.exists():
            rows, altered = _read(path)
            if altered:
                _back_up(path)
            self.rows = [row for row in rows if int(row["step"]) <= last_step]
        self._columns = list(self.rows[0]) if self.rows else []
        self._rewrite()

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a row. Reading the file gives the same floats exactly."""
        self.rows.append(
            {"step": str(step), **{name: repr(value) for name, value in metrics.items()}}
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
    """The rows of a table, and whether it has other lines than rows and an incomplete last line."""
    text = Path(readers.check_file(path)).read_bytes().decode(errors="replace")
    *lines, rest = text.split("\n")
    columns = (lines or [rest])[0].split(",")
    if columns[0] != "step" or len(set(columns)) < len(columns):
        return [], bool(text)
    rows = [row for line in lines[1:] if (row := _row(columns, line))]
    return rows, len(rows) < len(lines) - 1


def _row(columns: list[str], line: str) -> dict[str, str] | None:
    """A row: a step, then in each column a number or nothing. None if the line is no row."""
    cells = line.split(",")
    try:
        int(cells[0])
        [float(cell) for cell in cells if cell]
    except ValueError:
        return None
    return dict(zip(columns, cells, strict=True)) if len(cells) == len(columns) else None


def _back_up(path: Path) -> None:
    """Copies a damaged file to the first free name beside it, and reports that."""
    endings = itertools.chain([".damaged"], (f".damaged_{i}" for i in itertools.count(2)))
    copies = (path.with_name(path.name + ending) for ending in endings)
    copy = next(copy for copy in copies if not copy.exists())
    with replace_file(copy) as temporary:
        shutil.copyfile(path, temporary)
    tqdm.write(
        f"{path} is damaged; it is copied to {copy}, and lines that are no rows are dropped",
        file=sys.stderr,
    )


class MetricsWriter:
    """Writes metrics and images into a run's folder, and removes temporary files of a killed
    run."""

    def __init__(self, workdir: Path, last_step: int) -> None:
        self._workdir = workdir
        remove_temporary_files(workdir, recursive=False)
        remove_temporary_files(workdir / "images")
        self._table = MetricsFile(workdir / "metrics.csv", last_step)
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=last_step + 1)

    def write(
        self, step: int, metrics: Mapping[str, float], performance: Mapping[str, float]
    ) -> None:
        """Logs a step. Speed and memory are in TensorBoard only: a resumed run has to repeat
        metrics.csv exactly."""
        self._table.append(step, metrics)
        for name, value in {**metrics, **performance}.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()

    def write_images(
        self,
        step: int,
        images: Mapping[str, np.ndarray],
        texts: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    ) -> None:
        """Writes images/NAME_STEP.png for each uint8 [H, W, 3] image, and updates curves.png.

        `texts` has the text chunks of an image by its name.
        """
        for name, image in images.items():
            file = self._workdir / "images" / f"{name}_{step:07d}.png"
            image_files.save_png(file, image, text=texts.get(name, {}))
            self._tensorboard.add_image(name, image, step, dataformats="HWC")
        image_files.save_png(self._workdir / "curves.png", plot_curves(self._table.rows))

    def close(self) -> None:
        self._tensorboard.close()
