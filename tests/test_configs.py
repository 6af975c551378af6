"""Every file in configs/ is a run that can start."""

import importlib.util
from pathlib import Path

import pytest

from bitdance_jax.config import ClassConditionalTraining, TokenizerTraining, from_dict, to_dict
from bitdance_jax.data.sources import open_source


ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))


def read(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.get_config()


def test_there_are_configs():
    assert {"emoji_tokenizer.py", "emoji_4x.py"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_opens_with_its_launch_command_and_is_valid(path):
    module, config = read(path)
    assert f"`python train.py configs/{path.name}" in module.__doc__
    assert "A trial in" in module.__doc__
    assert isinstance(config, TokenizerTraining | ClassConditionalTraining)
    assert from_dict(type(config), to_dict(config)) == config
    assert config.run.workdir == f"runs/{path.stem}"
    assert config.optimizer.warmup_steps < config.run.steps


@pytest.mark.parametrize("path", [path for path in FILES if path.name.startswith("emoji")], ids=lambda path: path.stem)
def test_an_emoji_config_fits_the_pictures(path):
    _, config = read(path)
    source = open_source(config.data, "train")
    if isinstance(config, ClassConditionalTraining):
        assert config.model.num_classes == len(source.class_names)
        assert config.model.image_size == source[0]["image"].shape[0]
    else:
        assert config.image_size == source[0]["image"].shape[0]


def test_the_emoji_model_takes_the_emoji_tokenizer():
    _, tokenizer = read(ROOT / "configs" / "emoji_tokenizer.py")
    _, model = read(ROOT / "configs" / "emoji_4x.py")
    assert model.model.tokenizer == tokenizer.model
    assert model.model.image_size == tokenizer.image_size
    assert model.tokenizer == f"{tokenizer.run.workdir}/model"
