"""Weights that a run starts from: the right part of a folder, and one error for all that does not
fit."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_models
from flax import traverse_util

from bitdance_jax.config import RunConfig
from bitdance_jax.data.config import DataConfig
from bitdance_jax.errors import ConfigError, UserError
from bitdance_jax.io import model_folder, model_lookup
from bitdance_jax.train.class_conditional_training import ClassConditionalTraining
from bitdance_jax.train.initial import initial_params
from bitdance_jax.train.tokenizer_training import TokenizerTraining


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("initial")
    tiny_models.save_tokenizer(root / "tokenizer")
    tiny_models.save_model(root / "model")
    return root


@pytest.fixture
def config(folders, tmp_path):
    run, tokenizer = RunConfig(workdir=str(tmp_path / "run"), steps=1), str(folders / "tokenizer")
    return ClassConditionalTraining(
        run=run, model=tiny_models.MODEL, tokenizer=tokenizer, init=str(folders / "model")
    )


@pytest.fixture
def tokenizer_config(config):
    return TokenizerTraining(
        run=config.run, model=tiny_models.TOKENIZER, image_size=16, data=DataConfig()
    )


def assert_same(actual, desired):
    jax.tree.map(np.testing.assert_array_equal, actual, desired)


def test_a_model_starts_from_a_model(config, capsys):
    params = initial_params(config)
    assert_same(params, tiny_models.model_params())
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["tokenizer", "model"])
def test_a_tokenizer_starts_from_a_tokenizer_or_from_a_models(tokenizer_config, folders, name):
    assert_same(
        initial_params(dataclasses.replace(tokenizer_config, init=str(folders / name))),
        tiny_models.tokenizer_params(),
    )


def test_the_embedded_model_may_be_given(tokenizer_config):
    saved = model_lookup.load("emoji")
    sizes = dataclasses.replace(
        tiny_models.TOKENIZER, bits=32, ch_mult=(1, 1, 2, 4), num_codebooks=4
    )
    params = initial_params(
        dataclasses.replace(tokenizer_config, model=sizes, image_size=64, init="emoji")
    )
    assert_same(params, jax.tree.map(lambda x: x.astype(np.float32), saved.params["tokenizer"]))


def test_the_class_embedding_of_other_classes_is_random(config, capsys):
    model = dataclasses.replace(config.model, num_classes=12)
    params = initial_params(dataclasses.replace(config, model=model))
    saved = tiny_models.model_params()
    assert set(saved) - set(params) == {"class_embedding"}
    assert_same(params, {name: saved[name] for name in params})
    assert f"{config.init} has 9 classes and this run 12" in capsys.readouterr().err


def test_all_that_does_not_fit_is_one_error(config):
    transformer = dataclasses.replace(
        config.model.transformer, num_layers=config.model.transformer.num_layers + 1
    )
    head = dataclasses.replace(config.model.head, num_groups=config.model.head.num_blocks)
    other = dataclasses.replace(
        config, model=dataclasses.replace(config.model, transformer=transformer, head=head)
    )
    with pytest.raises(ConfigError) as caught:
        initial_params(other)
    message = str(caught.value)
    assert caught.value.field == "init" and "\n" not in message
    shapes = {
        "/".join(path): x.shape
        for path, x in traverse_util.flatten_dict(tiny_models.model_params()).items()
    }
    stacked = [name for name in shapes if "/layers/" in name]
    assert stacked and all(f"{name} is {shapes[name]} there and " in message for name in stacked)


def test_another_kind_of_model(config, tokenizer_config, folders):
    with pytest.raises(
        UserError,
        match=r"^init .* holds a tokenizer, and this run trains a class-conditional model$",
    ):
        initial_params(dataclasses.replace(config, init=str(folders / "tokenizer")))


def test_weights_for_the_bits_of_another_tokenizer_are_reported(config, tmp_path, capsys):
    params = jax.tree.map(lambda x: -x, tiny_models.tokenizer_params())
    data = model_lookup.read_config(config.tokenizer).config
    model_folder.save(tmp_path / "other", kind="tokenizer", config=data, params=params, metadata={})
    initial_params(dataclasses.replace(config, tokenizer=str(tmp_path / "other")))
    assert "trained on the bits of another tokenizer" in capsys.readouterr().err


def test_a_resumed_run_does_not_need_the_folder(config):
    assert initial_params(dataclasses.replace(config, init=None)) is None
    Path(config.run.checkpoint_folder, "500").mkdir(parents=True)
    assert initial_params(dataclasses.replace(config, init="gone")) is None
