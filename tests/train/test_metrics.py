"""metrics.csv through kills and resumes, and the images beside it."""

import csv
import os

import numpy as np
import pytest

from bitdance_jax.errors import UserError
from bitdance_jax.train.metrics import MetricsFile, MetricsWriter


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_rows_read_back_exactly(tmp_path):
    table = MetricsFile(tmp_path / "metrics.csv", 0)
    loss = float(np.float32(1) / 3)
    table.append(1, {"loss": loss})
    table.append(2, {"loss": 1e-30})
    assert [(row["step"], float(row["loss"])) for row in read(tmp_path / "metrics.csv")] == [
        ("1", loss),
        ("2", 1e-30),
    ]


def test_a_later_metric_becomes_a_column(tmp_path):
    table = MetricsFile(tmp_path / "metrics.csv", 0)
    table.append(1, {"loss": 0.5})
    table.append(2, {"loss": 0.25, "eval_psnr": 20.0})
    table.append(3, {"loss": 0.125})
    assert (
        tmp_path / "metrics.csv"
    ).read_text() == "step,loss,eval_psnr\n1,0.5,\n2,0.25,20.0\n3,0.125,\n"


def test_reopening_drops_later_rows_and_an_incomplete_line(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,eval_psnr\n1,0.5,\n2,0.25,20.0\n3,0.125,\n4,0.0")
    MetricsFile(path, 2).append(3, {"loss": 0.75})
    assert path.read_text() == "step,loss,eval_psnr\n1,0.5,\n2,0.25,20.0\n3,0.75,\n"


def test_an_incomplete_header_is_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,lo")
    MetricsFile(path, 10).append(11, {"loss": 0.5})
    assert path.read_text() == "step,loss\n11,0.5\n"


@pytest.mark.parametrize(
    ("foreign", "steps"),
    [
        (b"step,loss\n1,0.5\n\xff\xfe\x00\n3,0.25\n", ["1", "3"]),
        (b"step,loss\n1,0.5\n2,0.\x80\n", ["1"]),
        (b"step,loss\n1,0.5,7\n2\n3,many\n4,0.5\n\n", ["4"]),
        (b"\x89PNG\r\n\x1a\n", []),
        (b"notes", []),
        (b"name,age\nme,3\n", []),
        (b"step,loss,loss\n1,0.5,0.5\n", []),
        (b"\0" * 50, []),
    ],
)
def test_lines_that_are_no_rows_are_dropped_and_the_file_is_copied(
    tmp_path, capsys, foreign, steps
):
    path = tmp_path / "metrics.csv"
    path.write_bytes(foreign)
    for attempt in ("metrics.csv.damaged", "metrics.csv.damaged_2"):
        path.write_bytes(foreign)
        MetricsFile(path, 10)
        assert [row["step"] for row in read(path)] == steps
        assert (tmp_path / attempt).read_bytes() == foreign
        assert (
            f"{path} is damaged; it is copied to {tmp_path / attempt}," in capsys.readouterr().err
        )
    MetricsFile(path, 10)
    assert len(list(tmp_path.iterdir())) == 3 and capsys.readouterr().err == ""


def test_a_table_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "metrics.csv").mkdir()
    os.mkfifo(tmp_path / "metrics2.csv")  # would block a reader
    for name in ("metrics.csv", "metrics2.csv"):
        with pytest.raises(
            UserError, match=rf"{name} is not a file, but a folder, a pipe or a device$"
        ):
            MetricsFile(tmp_path / name, 10)


def test_a_new_run_drops_all_rows(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,0.5\n")
    MetricsFile(path, 0)
    assert path.read_text() == ""


def test_images_and_curves_are_written(tmp_path):
    leftover = ".bitdance_jax.0123456789abcdef"
    for name in (leftover, f"images/{leftover}", f"checkpoints/{leftover}"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    writer = MetricsWriter(tmp_path, 0)
    assert list(tmp_path.rglob(".*")) == [tmp_path / "checkpoints" / leftover]  # of another writer
    (tmp_path / "checkpoints" / leftover).unlink()
    for step in range(1, 4):
        writer.write(step, {"epoch": step / 2, "loss": 1 / step}, {"images_per_second": 10.0})
    writer.write_images(3, {"samples": np.zeros((8, 8, 3), np.uint8)})
    writer.close()
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert {"metrics.csv", "curves.png", "images/samples_0000003.png"} <= names
    assert not any(path.name.startswith(".") for path in tmp_path.rglob("*"))
    assert list((tmp_path / "tensorboard").iterdir())
