"""Every command that reads a model takes a Hugging Face id."""

import dataclasses
import importlib
import json
import sys

import pytest
import tiny_models

from bitdance_jax.app import serve
from bitdance_jax.cli.command_line import run
from bitdance_jax.cli.main import COMMANDS
from bitdance_jax.config import RunConfig
from bitdance_jax.data.config import DataConfig
from bitdance_jax.errors import FileError
from bitdance_jax.io.model_lookup import fingerprint
from bitdance_jax.pipelines import hub_models
from bitdance_jax.train.class_conditional_training import (
    ClassConditionalTask,
    ClassConditionalTraining,
)
from bitdance_jax.train.initial import initial_params
from bitdance_jax.train.tokenizer_training import TokenizerTask, TokenizerTraining


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BITDANCE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.mark.parametrize(
    "line",
    [
        "sample --checkpoint owner/name",
        "evaluate emoji --reconstruction owner/name",
        "evaluate-prompts --checkpoint owner/name --out images --dpg prompts.json",
        "sweep --checkpoint owner/name",
        "tokenize --tokenizer owner/name --out tokens",
        "train emoji_4x --tokenizer owner/name",
        "train emoji_4x --init owner/name",
        "train emoji_tokenizer --init owner/name",
        "train text_to_image --trial --tokenizer owner/name",
        "train text_to_image --trial --text-tokenizer owner/name",
        "train text_to_image --trial --init owner/name",
        "plan owner/name",
        "app --checkpoint owner/name",
        "convert owner/name/model.pt out",
        "convert owner/name out.safetensors --to torch",
    ],
)
def test_a_command_fetches_the_model(line, cache, monkeypatch, capsys):
    """The hub refuses here, so the command ends with the hub's line, before anything compiles."""

    def refuse(name, *_, **__):
        raise FileError(f"the hub was asked for {name}")

    (cache.parents[1] / "prompts.json").write_text('{"1": "a cat"}')
    monkeypatch.setattr(hub_models, "convert", refuse)
    monkeypatch.setattr("bitdance_jax.convert.hub.download", refuse)
    monkeypatch.setattr("bitdance_jax.convert.hub_config.read", refuse)
    monkeypatch.setattr(serve, "import_gradio", lambda: None)
    monkeypatch.setattr(serve, "check_address", lambda *_: None)
    command, *flags = line.split()
    monkeypatch.setattr(sys, "argv", [f"bitdance {command}", *flags])
    assert run(importlib.import_module(COMMANDS[command].module).main) == 2
    name = next(flag for flag in flags if flag.startswith("owner"))
    assert capsys.readouterr().err.splitlines()[-1] == f"error: the hub was asked for {name}"
    assert not [*cache.glob("*"), *cache.parents[1].glob("runs")], "left behind"


@pytest.mark.slow
@pytest.mark.usefixtures("few_emoji")
def test_a_run_on_models_of_the_hub(cache, tmp_path):
    """The config keeps the ids, and the run's record has the folder that they are in."""
    tiny_models.save_tokenizer(cache / "owner--tokenizer")
    tiny_models.save_model(cache / "owner--small")
    config = ClassConditionalTraining(
        run=RunConfig(workdir=str(tmp_path / "run"), steps=1),
        model=tiny_models.MODEL,
        tokenizer="owner/tokenizer",
        init="owner/small",
    )
    folder = str(cache / "owner--tokenizer")
    assert ClassConditionalTask(config).record.tokenizer == (folder, fingerprint(folder))
    assert initial_params(config).keys() == tiny_models.model_params().keys()
    stage_2 = TokenizerTraining(
        run=config.run,
        model=tiny_models.GAN_TOKENIZER,
        image_size=16,
        data=DataConfig(),
        train_encoder=False,
        init="owner/tokenizer",
    )
    assert TokenizerTask(stage_2).record.tokenizer == (folder, fingerprint(folder))
    assert config.tokenizer == "owner/tokenizer"
    assert json.dumps(dataclasses.asdict(config)).count("owner/") == 2
