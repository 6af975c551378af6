"""metrics.csv through kills and resumes, and the pictures beside it."""

import csv

import numpy as np

from bitdance_jax.train.metrics import MetricsFile, MetricsWriter


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_rows_read_back_exactly(tmp_path):
    table = MetricsFile(tmp_path / "metrics.csv", 0)
    loss = float(np.float32(1) / 3)
    table.append(1, {"loss": loss})
    table.append(2, {"loss": 1e-30})
    assert [(row["step"], float(row["loss"])) for row in read(tmp_path / "metrics.csv")] == [("1", loss), ("2", 1e-30)]


def test_a_later_figure_becomes_a_column(tmp_path):
    table = MetricsFile(tmp_path / "metrics.csv", 0)
    table.append(1, {"loss": 0.5})
    table.append(2, {"loss": 0.25, "eval_psnr": 20.0})
    table.append(3, {"loss": 0.125})
    assert (tmp_path / "metrics.csv").read_text() == "step,loss,eval_psnr\n1,0.5,\n2,0.25,20.0\n3,0.125,\n"


def test_reopening_drops_later_rows_and_a_half_line(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,eval_psnr\n1,0.5,\n2,0.25,20.0\n3,0.125,\n4,0.0")
    MetricsFile(path, 2).append(3, {"loss": 0.75})
    assert path.read_text() == "step,loss,eval_psnr\n1,0.5,\n2,0.25,20.0\n3,0.75,\n"


def test_a_half_header_is_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,lo")
    MetricsFile(path, 10).append(11, {"loss": 0.5})
    assert path.read_text() == "step,loss\n11,0.5\n"


def test_starting_anew_drops_all(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,0.5\n")
    MetricsFile(path, 0)
    assert path.read_text() == ""


def test_pictures_and_curves_are_written(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in range(1, 4):
        writer.write(step, {"epoch": step / 2, "loss": 1 / step}, {"images_per_second": 10.0})
    writer.write_pictures(3, {"samples": np.zeros((8, 8, 3), np.uint8)})
    writer.close()
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert {"metrics.csv", "curves.png", "pictures/samples_0000003.png"} <= names
    assert not any(path.name.startswith(".") for path in tmp_path.rglob("*"))
    assert list((tmp_path / "tensorboard").iterdir())
