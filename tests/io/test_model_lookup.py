"""A training run used as a model, finished or not."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

import bitdance_jax
from bitdance_jax.config import MeshConfig, RunConfig
from bitdance_jax.data.config import DataConfig
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.errors import FileError
from bitdance_jax.io import model_folder, model_lookup
from bitdance_jax.train import loop
from bitdance_jax.train.checkpoint import Checkpoints
from bitdance_jax.train.class_conditional_training import ClassConditionalTraining
from bitdance_jax.train.state import (
    TrainState,
    abstract_state,
    learning_rate_schedule,
    make_optimizer,
)


MESH = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def stopped_once(toy, tmp_path_factory):
    """A toy run of 20 steps, stopped after step 14. Its last checkpoints are of steps 7 and 14."""
    folder = tmp_path_factory.mktemp("stopped")
    config = dataclasses.replace(toy.training_config(folder, 14), mesh=MeshConfig())
    loop.train(toy.ToyTask(), config, mesh=MESH)
    shutil.rmtree(folder / "model")
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    return Path(shutil.copytree(stopped_once, tmp_path / "run"))


@pytest.fixture
def ema(toy, stopped_once):
    """The EMA weights of the run's checkpoint of a step, as training itself reads them."""
    config = toy.training_config(stopped_once, 14)
    objective = toy.ToyTask().objective
    optimizer = make_optimizer(
        config.optimizer, learning_rate_schedule(config.optimizer, 14), objective
    )

    def read(step):
        with Checkpoints(stopped_once / "checkpoints", 2) as checkpoints:
            state, _ = checkpoints._read(step, abstract_state(objective, optimizer, MESH))
        return jax.device_get(state.ema)

    return read


def assert_same(actual, desired):
    jax.tree.map(np.testing.assert_array_equal, actual, desired)


def test_an_unfinished_run_gives_its_newest_ema_weights(stopped, ema, capsys):
    loaded = model_lookup.load(stopped)
    assert (loaded.kind, loaded.metadata) == ("tokenizer", {"steps": 14})
    assert_same(loaded.params, ema(14))
    assert "step 14" in capsys.readouterr().err
    assert {path.name for path in (stopped / "checkpoints").iterdir()} == {"7", "14"}


def test_a_damaged_checkpoint_is_skipped(stopped, ema, capsys):
    for path in (stopped / "checkpoints" / "14" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(b"\0" * path.stat().st_size)
    loaded = model_lookup.load(stopped)
    assert loaded.metadata["steps"] == 7
    assert_same(loaded.params, ema(7))
    assert "step 14" in capsys.readouterr().err.splitlines()[0]
    shutil.rmtree(stopped / "checkpoints" / "7")
    with pytest.raises(FileError, match=str(stopped)):
        model_lookup.load(stopped)


def test_weights_with_other_checksums_are_refused(stopped, monkeypatch):
    monkeypatch.setattr(model_lookup, "checksum", lambda array: 7)
    with pytest.raises(FileError, match=str(stopped)):
        model_lookup.load(stopped)


def test_a_finished_run_gives_its_model_folder_until_it_is_continued(stopped, ema):
    model_folder.save(
        stopped / "model",
        kind="tokenizer",
        config={},
        params={"a": np.ones(2)},
        metadata={"steps": 14},
        force=True,
    )
    assert model_lookup.locate(stopped) == stopped / "model"
    assert model_lookup.fingerprint(stopped) == model_lookup.fingerprint(stopped / "model")
    assert_same(model_lookup.load(stopped).params, {"a": np.ones(2)})
    model_folder.save(
        stopped / "model",
        kind="tokenizer",
        config={},
        params={"a": np.ones(2)},
        metadata={"steps": 13},
        force=True,
    )
    assert_same(model_lookup.load(stopped).params, ema(14))


def test_each_checkpoint_has_another_fingerprint(stopped):
    before = model_lookup.fingerprint(stopped)
    shutil.rmtree(stopped / "checkpoints" / "14")
    assert len(before) == 12 and model_lookup.fingerprint(stopped) != before
    with pytest.raises(FileError, match=str(stopped)):
        model_lookup.check_unchanged(stopped, before)


def test_a_run_that_has_saved_nothing(stopped):
    shutil.rmtree(stopped / "checkpoints")
    with pytest.raises(FileError, match=str(stopped)):
        model_lookup.read_config(stopped)


def test_a_damaged_record(stopped):
    (stopped / "model.json").write_text('{"kind": "tokenizer"')
    with pytest.raises(FileError) as caught:
        model_lookup.load(stopped)
    assert caught.value.args[0].startswith(str(stopped / "model.json"))
    assert "\n" not in str(caught.value)


def test_a_class_conditional_run_has_its_tokenizer_names_and_sampler(tmp_path, few_emoji):
    tokenizer = tiny_models.save_tokenizer(tmp_path / "tokenizer")
    run = tmp_path / "run"
    config = ClassConditionalTraining(
        run=RunConfig(workdir=str(run), steps=3),
        model=tiny_models.MODEL,
        tokenizer=str(tokenizer),
        data=DataConfig(batch_size=8),
        preview=tiny_models.SAMPLER,
    )
    config.make_task().record.write(run)
    params = tiny_models.model_params()
    with Checkpoints(run / "checkpoints", 2) as checkpoints:
        checkpoints.save(2, TrainState(np.int32(2), {}, jax.tree.map(jnp.asarray, params), {}), {})
    model = bitdance_jax.load(run)
    assert (model.config, model.sampler, model.class_names[2]) == (
        config.model,
        config.preview,
        "Flags",
    )
    assert_same(model.tokenizer.params, model_folder.load(tokenizer).params)
    assert_same(model_lookup.load(run).params["model"], params)
    shutil.rmtree(tokenizer)
    tiny_models.save_tokenizer(
        tokenizer, dataclasses.replace(tiny_models.TOKENIZER, num_codebooks=2)
    )
    with pytest.raises(FileError, match=str(tokenizer)):
        bitdance_jax.load(run)


def test_relative_paths_of_a_run(stopped, monkeypatch):
    """They are relative to the folder in which the run was started."""
    (stopped / "checkpoints").rename(stopped.parent / "elsewhere")
    monkeypatch.chdir(stopped.parent)
    model_lookup.RunRecord("tokenizer", {}, {}, "elsewhere", ("emoji", "")).write(stopped)
    monkeypatch.chdir("/")
    run = model_lookup.locate(stopped)
    assert run.record.tokenizer == ("emoji", "") and run.steps == (14, 7)
    assert str(model_lookup.checkpoint_folder(stopped, run.record)) == str(
        stopped.parent / "elsewhere"
    )
