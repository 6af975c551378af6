"""Every file in configs/ is a run that can start."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import bitdance_jax
from bitdance_jax.cli.flags import parse
from bitdance_jax.config import ClassConditionalConfig, SamplerConfig, from_dict, to_dict
from bitdance_jax.train.class_conditional_training import ClassConditionalTraining
from bitdance_jax.train.task import TrainingConfig


ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.py"))
IMAGENET = {
    "b_1x": 3.2,
    "b_4x": 3.9,
    "b_16x": 6.1,
    "l_1x": 4.0,
    "h_1x": 4.55,
}  # guidance scales (paper 4.2)


def read(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.get_config()


def test_there_are_configs():
    assert {path.stem for path in FILES} == {
        "emoji_tokenizer",
        "emoji_4x",
        *(f"imagenet_{name}" for name in IMAGENET),
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_opens_with_its_launch_command_and_is_valid(path):
    module, config = read(path)
    assert f"`python train.py configs/{path.name}" in module.__doc__
    assert "A trial in" in module.__doc__
    assert isinstance(config, TrainingConfig)
    assert from_dict(type(config), to_dict(config)) == config
    assert config.run.workdir == f"runs/{path.stem}"
    assert config.optimizer.warmup_steps < config.run.steps


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name.startswith("emoji")], ids=lambda path: path.stem
)
def test_an_emoji_config_fits_the_images(path):
    _, config = read(path)
    source = config.data.open_split("train")
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


@pytest.mark.parametrize("name", IMAGENET)
def test_an_imagenet_config_is_the_papers_recipe(name):
    _, config = read(ROOT / "configs" / f"imagenet_{name}.py")
    assert config.model == ClassConditionalConfig.imagenet(name)
    assert config.preview == SamplerConfig(
        head_steps=100, guidance_scale=IMAGENET[name], guidance_schedule="linear"
    )
    assert config.run.steps * config.data.batch_size == pytest.approx(800 * 1_281_167, rel=1e-6)
    assert config.run.compute_dtype == "bfloat16"
    assert config.tokenizer == "models/ae_d16c32_imagenet"
    augment = config.data.augment
    assert (augment.min_crop, augment.flip, augment.decay_start, augment.decay_end) == (
        0.8,
        0.5,
        700,
        750,
    )
    optimizer = config.optimizer
    assert (
        optimizer.learning_rate,
        optimizer.warmup_steps,
        optimizer.schedule,
        optimizer.end_learning_rate,
    ) == (
        6e-4,
        20_000,
        "cosine",
        1e-5,
    )
    assert (
        optimizer.b1,
        optimizer.b2,
        optimizer.weight_decay,
        optimizer.clip_norm,
        optimizer.ema_decay,
    ) == (0.9, 0.95, 0.05, 1.0, 0.9999)


def trial(name):
    """The config of the trial that the file's docstring gives."""
    module, config = read(ROOT / "configs" / f"imagenet_{name}.py")
    assert (
        f"convert shallowdream204/BitDance-ImageNet/ae_d16c32.pt {config.tokenizer}`"
        in module.__doc__
    )
    (command,) = re.findall(
        rf"    python train.py configs/imagenet_{name}.py (.*)", module.__doc__, re.DOTALL
    )
    return parse(type(config), shlex.split(command.replace("\\\n", "")), config)


@pytest.mark.parametrize("name", IMAGENET)
def test_an_imagenet_config_has_a_trial_on_the_emoji(name):
    config = trial(name)
    assert config.data.source == config.tokenizer == "emoji"
    assert config.model.tokens_per_step == ClassConditionalConfig.imagenet(name).tokens_per_step
    assert config.model.tokenizer == bitdance_jax.load("emoji").tokenizer.config
