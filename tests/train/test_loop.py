"""What the loop writes, and how it refuses."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from bitdance_jax.config import MeshConfig
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.errors import UserError
from bitdance_jax.io import model_folder
from bitdance_jax.io.locks import writer_lock
from bitdance_jax.train.loop import train


@pytest.fixture(scope="module")
def run(toy):
    """Trains the toy in a folder: 10 steps, of which every 2nd is logged, every 4th saved and every
    5th drawn."""

    def run(workdir, task=None, optimizer=None, initial=None, hooks=(), **changes):
        settings = {"steps": 10, "log_every": 2, "save_every": 4, "preview_every": 5} | changes
        config = toy.training_config(workdir, **settings)
        config = dataclasses.replace(
            config,
            mesh=MeshConfig(),
            optimizer=dataclasses.replace(config.optimizer, **(optimizer or {})),
        )
        train(
            task or toy.ToyTask(),
            config,
            mesh=make_mesh(config.mesh, jax.devices()[:1]),
            initial=initial,
            hooks=hooks,
        )

    return run


@pytest.fixture(scope="module")
def finished_once(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(folder)
    return folder


@pytest.fixture
def finished(finished_once, tmp_path):
    """The folder of a run of 10 steps, to be changed."""
    return Path(shutil.copytree(finished_once, tmp_path / "run"))


def read(workdir):
    with (workdir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_what_a_run_leaves(finished):
    assert [int(row["step"]) for row in read(finished)] == [2, 4, 5, 6, 8, 10]
    assert [row["step"] for row in read(finished) if row["eval_norm"]] == ["5", "10"]
    assert [float(row["epoch"]) for row in read(finished)] == [0.4, 0.8, 1.0, 1.2, 1.6, 2.0]
    assert {"loss", "largest_error", "grad_norm", "learning_rate"} <= set(read(finished)[0])
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"8", "10"}
    assert sorted(path.name for path in (finished / "images").iterdir()) == [
        "kernel_0000005.png",
        "kernel_0000010.png",
    ]
    with Image.open(finished / "curves.png") as curves:
        assert curves.size[1] > 0
    assert json.loads((finished / "config.json").read_text())["run"]["steps"] == 10
    assert (finished / "model/config.json").exists()


def test_more_steps_resume_from_the_last(run, finished):
    run(finished, steps=14, log_every=1)
    assert [int(row["step"]) for row in read(finished)] == [2, 4, 5, 6, 8, 10, 11, 12, 13, 14]
    assert json.loads((finished / "config.json").read_text())["run"]["steps"] == 14


def test_another_config_is_refused_by_name(run, finished):
    before = (finished / "config.json").read_bytes()
    with pytest.raises(
        UserError,
        match=r"\(optimizer\.learning_rate was 0\.\d+, now 1\.0, run\.seed was 0, now 7\)",
    ):
        run(finished, optimizer={"learning_rate": 1.0}, seed=7)
    assert (finished / "config.json").read_bytes() == before


@pytest.mark.parametrize("locked", ["run", "run/checkpoints"])
def test_a_second_run_in_the_folder_or_with_its_checkpoints_is_refused(run, finished, locked):
    config = (finished / "config.json").read_bytes()
    other = finished if locked == "run" else finished.with_name("other")
    with writer_lock(finished.parent / locked, is_folder=True):
        with pytest.raises(
            UserError,
            match=f"^another process is writing {finished.parent / locked}; wait for it, or",
        ):
            run(other, seed=7, checkpoints=str(finished / "checkpoints"))
    assert (finished / "config.json").read_bytes() == config
    assert [path.name for path in finished.parent.iterdir()] == ["run"]


def test_another_model_is_refused(toy, run, finished):
    with pytest.raises(UserError, match="is of another model"):
        run(finished, toy.ToyTask(width=32), steps=20)


def test_a_loss_that_is_not_finite_stops_at_its_step_and_is_not_saved(toy, run, tmp_path):
    task = toy.ToyTask()
    loss = task.objective.loss

    def diverging(params, frozen, batch, keys):
        value, metrics = loss(params, frozen, batch, keys)
        return value + jnp.nan, metrics

    task.objective.loss = diverging
    with pytest.raises(UserError, match=r"loss is nan at step 1 \(nothing is saved yet\)"):
        run(tmp_path, task)
    assert not (tmp_path / "checkpoints").exists()
    run(tmp_path)  # Nothing of it is in the way.


@pytest.mark.slow
def test_the_seed_decides_everything(run, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, seed=seed)
    a, b, c = ([float(row["loss"]) for row in read(tmp_path / name)] for name in "abc")
    assert a == b
    assert not np.isclose(a, c).any()


def test_a_new_run_starts_from_given_weights_and_a_resumed_one_does_not(run, tmp_path):
    given = {"fc1": {"bias": np.linspace(1.0, 2.0, 16, dtype=np.float32)}}
    still = {"learning_rate": 1e-12, "weight_decay": 0.0}
    run(tmp_path, optimizer=still, initial=given, steps=2)
    params = model_folder.load(tmp_path / "model").params
    np.testing.assert_allclose(params["fc1"]["bias"], given["fc1"]["bias"], rtol=1e-6)
    assert np.std(params["fc1"]["kernel"]) > 0.5  # random
    run(tmp_path, optimizer=still, initial={"fc1": {"bias": np.zeros(16, np.float32)}}, steps=4)
    np.testing.assert_allclose(
        model_folder.load(tmp_path / "model").params["fc1"]["bias"], given["fc1"]["bias"], rtol=1e-6
    )
