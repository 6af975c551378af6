"""A run writes into a new folder or its own."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_models
from flax import traverse_util

from bitdance_jax.config import RunConfig, to_dict
from bitdance_jax.errors import UserError
from bitdance_jax.io import model_folder
from bitdance_jax.train.class_conditional_training import ClassConditionalTraining
from bitdance_jax.train.run_folder import check_config, record_config
from bitdance_jax.train.task import TrainingConfig


def config(workdir, **changes) -> TrainingConfig:
    return TrainingConfig(run=RunConfig(workdir=str(workdir), steps=3, **changes))


@pytest.mark.parametrize(
    "name",
    ["config.json", "metrics.csv", "model/config.json", "images/cat.png", "checkpoints/1/x"],
)
def test_files_that_no_run_wrote_are_not_overwritten(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(UserError, match=f"would overwrite its {name.split('/')[0]}; "):
        check_config(config(tmp_path))


def test_other_files_may_be_in_the_folder(tmp_path):
    (tmp_path / "thesis.tex").touch()
    (tmp_path / "images").mkdir()
    check_config(config(tmp_path))


def test_the_folder_of_the_same_run(tmp_path):
    record_config(config(tmp_path))
    (tmp_path / "metrics.csv").touch()
    params = {"kernel": np.ones(3)}
    model_folder.save(tmp_path / "model", kind="tokenizer", config={}, params=params, metadata={})
    check_config(config(tmp_path, seed=1))  # It has no checkpoints yet.
    (tmp_path / "model" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"model holds notes\.txt, which is not of its model"):
        check_config(config(tmp_path))


def test_the_folder_of_a_run_of_another_kind(tmp_path):
    """Few of the differences are named."""
    run = RunConfig(workdir=str(tmp_path), steps=3)
    record_config(ClassConditionalTraining(run=run, model=tiny_models.MODEL, tokenizer=""))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(UserError, match=r" and \d+ more\); set another run.workdir") as caught:
        check_config(config(tmp_path))
    assert str(caught.value).count(" was ") == 8


NEWER = ("model.transformer.residual_dtype", "run.gradient_dtype")


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_run_of_a_version_before_float32_streams_and_sums(tmp_path, compute):
    """Its config.json lacks both fields; only in bfloat16 did it differ from their defaults."""
    run = RunConfig(workdir=str(tmp_path), steps=2, compute_dtype=compute)
    config = ClassConditionalTraining(run=run, model=tiny_models.MODEL, tokenizer="")
    recorded = traverse_util.flatten_dict(to_dict(config), sep=".")
    (tmp_path / "config.json").write_text(
        json.dumps(
            traverse_util.unflatten_dict(
                {name: recorded[name] for name in recorded if name not in NEWER}, sep="."
            )
        )
    )
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    if compute == "float32":
        check_config(config)
        return
    with pytest.raises(
        UserError,
        match=r"residual_dtype was 'compute', now 'float32', run\.gradient_dtype was 'compute'",
    ):
        check_config(config)
    transformer = dataclasses.replace(config.model.transformer, residual_dtype="compute")
    model = dataclasses.replace(config.model, transformer=transformer)
    check_config(
        dataclasses.replace(
            config, model=model, run=dataclasses.replace(run, gradient_dtype="compute")
        )
    )
