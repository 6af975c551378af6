"""What the loop writes, and how it refuses."""

import csv
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from bitdance_jax.errors import UserError
from bitdance_jax.train.loop import train


@pytest.fixture
def finished(toy, tmp_path):
    """The folder of a run of 10 steps that logs every 2, saves every 4 and draws every 5."""
    workdir = tmp_path / "run"
    train(toy.ToyTask(), run_config(toy, workdir), toy.OPTIMIZER)
    return workdir


def run_config(toy, workdir, **changes):
    config = dataclasses.replace(toy.run_config(str(workdir), 10), log_every=2, save_every=4, preview_every=5)
    return dataclasses.replace(config, **changes)


def read(workdir):
    with (workdir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_what_a_run_leaves(finished):
    assert [int(row["step"]) for row in read(finished)] == [2, 4, 5, 6, 8, 10]
    assert [row["step"] for row in read(finished) if row["eval_norm"]] == ["5", "10"]
    assert [float(row["epoch"]) for row in read(finished)] == [0.4, 0.8, 1.0, 1.2, 1.6, 2.0]
    assert {"loss", "largest_error", "grad_norm", "learning_rate"} <= set(read(finished)[0])
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"8", "10"}
    assert sorted(path.name for path in (finished / "pictures").iterdir()) == ["kernel_0000005.png", "kernel_0000010.png"]
    with Image.open(finished / "curves.png") as curves:
        assert curves.size[1] > 0
    assert json.loads((finished / "config.json").read_text())["run"]["steps"] == 10
    assert (finished / "model.npz").exists()


def test_more_steps_go_on_from_the_last(toy, finished):
    train(toy.ToyTask(), run_config(toy, finished, steps=14, log_every=1), toy.OPTIMIZER)
    assert [int(row["step"]) for row in read(finished)] == [2, 4, 5, 6, 8, 10, 11, 12, 13, 14]
    assert json.loads((finished / "config.json").read_text())["run"]["steps"] == 14


def test_another_config_is_refused_by_name(toy, finished):
    before = (finished / "config.json").read_bytes()
    other = dataclasses.replace(toy.OPTIMIZER, learning_rate=1.0)
    with pytest.raises(UserError, match=r"another config \(optimizer\.learning_rate was 0\.003, now 1\.0, run\.seed was 0, now 7\)"):
        train(toy.ToyTask(), run_config(toy, finished, seed=7), other)
    assert (finished / "config.json").read_bytes() == before


def test_the_recorded_config_may_hold_tuples(toy, tmp_path):
    config = {"model": {"ch_mult": (1, 2)}, "run": {}}
    for _ in range(2):
        train(toy.ToyTask(), run_config(toy, tmp_path), toy.OPTIMIZER, config)
    with pytest.raises(UserError, match=r"model\.ch_mult was \[1, 2\], now \[1, 4\]"):
        train(toy.ToyTask(), run_config(toy, tmp_path), toy.OPTIMIZER, {"model": {"ch_mult": (1, 4)}, "run": {}})


def test_another_model_is_refused(toy, finished):
    with pytest.raises(UserError, match="is of another model"):
        train(toy.ToyTask(width=32), run_config(toy, finished, steps=20), toy.OPTIMIZER)


def test_a_loss_that_is_not_finite_stops_and_is_not_saved(toy, tmp_path):
    class Diverging(toy.ToyTask):
        def loss(self, params, batch, key):
            loss, metrics = super().loss(params, batch, key)
            return loss + jnp.where(batch["x"].mean() > -10, jnp.nan, 0.0), metrics

    with pytest.raises(UserError, match=r"loss is nan at step 1 \(nothing is saved yet\)"):
        train(Diverging(), run_config(toy, tmp_path), toy.OPTIMIZER)
    train(toy.ToyTask(), run_config(toy, tmp_path), toy.OPTIMIZER)  # Nothing of it is in the way.


@pytest.mark.slow
def test_the_seed_decides_everything(toy, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(toy.ToyTask(), run_config(toy, tmp_path / name, seed=seed), toy.OPTIMIZER)
    a, b, c = ([float(row["loss"]) for row in read(tmp_path / name)] for name in "abc")
    assert a == b
    assert not np.isclose(a, c).any()
