"""The examples run at toy size, and their configs work with `bitdance train`."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from bitdance_jax.cli.config_file import load_config
from bitdance_jax.cli.flags import parse
from bitdance_jax.data.loader import make_loader
from bitdance_jax.distributed.mesh import AXES
from bitdance_jax.distributed.sharding import parameter_spec


FOLDER = Path(__file__).parents[2] / "examples"
TRAINING = ("dataset", "objective", "hook", "own_data")
"""The examples that train; each has a `get_config`."""


def load(name: str) -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", TRAINING)
def test_an_example_trains(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    load(name).main()
    captured = capsys.readouterr()
    assert "the model is in" in captured.err
    if name == "hook":
        rows = [json.loads(line) for line in captured.out.splitlines()]
        assert [row["step"] for row in rows] == list(range(2, 2 * len(rows) + 2, 2))
        values = [row["eval_psnr"] for row in rows]
        failures = [value <= max(values[:i], default=0) for i, value in enumerate(values)]
        # It stops once two evaluations in a row have not improved.
        assert [i for i in range(1, len(rows)) if all(failures[i - 1 : i + 1])] == [len(rows) - 1]
    if name == "own_data":
        assert "(2, 32, 32, 3)" in captured.out


@pytest.mark.parametrize("name", TRAINING)
def test_the_command_takes_its_config(name):
    default, _ = load_config(str(FOLDER / f"{name}.py"))
    own = ["--classification", "0.5"] if name == "objective" else []
    flags = ["--run.steps", "7", "--data.batch-size", "4", *own]
    config = parse(type(default), flags, default)
    assert type(config) is type(default) and type(config.data) is type(default.data)
    assert (config.run.steps, config.data.batch_size) == (7, 4)
    if own:
        assert config.classification == 0.5


def test_worker_processes_read_the_dataset(tmp_path):
    """Its source is defined in a config file, which the workers cannot import."""
    load("dataset").write_toy_archive(tmp_path / "archive.npz")
    config, _ = load_config(str(FOLDER / "dataset.py"))
    data = dataclasses.replace(config.data, path=str(tmp_path / "archive.npz"))
    train, held_out = data.open_splits()
    assert (len(train), len(held_out)) == (61, 3) and train.class_names == ("dark", "bright")
    loader = make_loader(train, batch_size=8, seed=0, image_size=16, workers=1)
    batch = next(loader)
    loader.close()
    np.testing.assert_array_equal(batch["image"].mean(axis=(1, 2, 3)) > 127, batch["label"] == 1)


def test_the_objective_has_a_sharding_rule():
    objective = load("objective").get_config().make_objective()
    shape = jax.eval_shape(objective.init, jax.random.key(0))["classifier"]["kernel"].shape
    mesh = AbstractMesh((1, 2, 1), AXES)
    spec = parameter_spec(mesh, "classifier/kernel", shape, rules=objective.sharding_rules)
    assert spec == PartitionSpec("fsdp", None)


def test_the_objective_trains_its_classifier():
    objective = load("objective").get_config().make_objective()
    keys = jax.random.split(jax.random.key(0), 8)
    step = jax.ShapeDtypeStruct((), np.int32)
    params = jax.eval_shape(objective.init, keys[0])
    arguments = params, {}, {}, objective.abstract_batch(8), keys, step
    _, (metrics, _) = jax.eval_shape(objective.auxiliary_loss, *arguments)
    assert {"l2", "cross_entropy", "accuracy"} <= metrics.keys()
