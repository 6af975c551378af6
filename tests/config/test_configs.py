"""Every shipped config is a run that can start, and has a trial."""

import importlib

import pytest

from bitdance_jax.cli.config_file import load_config
from bitdance_jax.config import (
    ClassConditionalConfig,
    SamplerConfig,
    TextToImageConfig,
    TokenizerConfig,
    from_dict,
    to_dict,
)
from bitdance_jax.configs import SHIPPED
from bitdance_jax.data import emoji
from bitdance_jax.errors import ConfigError, FileError
from bitdance_jax.io import model_lookup
from bitdance_jax.train.class_conditional_training import ClassConditionalTraining
from bitdance_jax.train.task import TrainingConfig
from bitdance_jax.train.text_to_image_training import TextToImageTraining


IMAGENET = {
    "b_1x": 3.2,
    "b_4x": 3.9,
    "b_16x": 6.1,
    "l_1x": 4.0,
    "h_1x": 4.55,
}  # guidance scales (paper section 4.2)


TEXT_TO_IMAGE = ("14b_16x", "14b_64x", "8b_16x", "4b_16x", "1.7b_16x", "0.6b_16x")


def test_there_are_configs():
    names = {f"imagenet_{name}" for name in IMAGENET}
    names |= {f"tokenizer_{name}" for name in ("d16c32", "d32c128", "d32c256")}
    names |= {f"t2i_{name}" for name in TEXT_TO_IMAGE}
    names |= {"emoji_tokenizer", "emoji_4x", "emoji_t2i", "emoji_edit"}
    assert SHIPPED.keys() == names | {"imagenet", "tokenizer", "text_to_image"}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_config_opens_with_its_launch_command_and_is_valid(name):
    file, _ = SHIPPED[name]
    module = importlib.import_module(f"bitdance_jax.configs.{file}")
    assert f"    bitdance train {file}" in module.__doc__
    assert "`--trial`" in module.__doc__
    config, rest = load_config(name, ["--run.steps", "7"])
    assert rest == ["--run.steps", "7"]
    assert isinstance(config, TrainingConfig)
    assert from_dict(type(config), to_dict(config)) == config
    default = {
        "imagenet": "imagenet_b_1x",
        "tokenizer": "tokenizer_d16c32",
        "text_to_image": "t2i_14b_16x",
    }.get(name, name)
    if file == "text_to_image":
        default += "_finetune"
    assert config.run.workdir == f"runs/{default}"
    assert config.optimizer.warmup_steps < config.run.steps


def test_the_emoji_models_take_the_emoji_tokenizer_and_fit_the_images():
    tokenizer, _ = load_config("emoji_tokenizer")
    classes, _ = load_config("emoji_4x")
    prompts, _ = load_config("emoji_t2i")
    assert tokenizer.image_size == classes.model.image_size == emoji.SIDE
    assert prompts.data.resolutions == (emoji.SIDE,)
    assert classes.with_classes_of_data() == classes
    for config in (classes, prompts):
        assert config.model.tokenizer == tokenizer.model
        assert config.tokenizer == f"{tokenizer.run.workdir}/model"


def test_variants_of_the_emoji_tokenizer_have_runs_of_their_own():
    flags = ([], ["--losses", "plain"], ["--latents", "continuous"])
    full, plain, continuous = (load_config("emoji_tokenizer", chosen)[0] for chosen in flags)
    assert len({config.run.workdir for config in (full, plain, continuous)}) == 3
    assert full.loss.perceptual > 0 and full.loss.adversarial > 0
    assert plain.loss.perceptual == plain.loss.adversarial == 0
    assert continuous.model.latents == "continuous"


@pytest.mark.parametrize("name", IMAGENET)
def test_an_imagenet_config_is_the_papers_recipe(name):
    config, _ = load_config(f"imagenet_{name}")
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


@pytest.mark.parametrize("name", SHIPPED)
def test_a_trial_is_small_and_on_the_embedded_images(name):
    config, _ = load_config(name)
    trial = config.trial()
    if isinstance(trial, TextToImageTraining):
        assert trial.data.paths == ("emoji",)
    else:
        assert trial.data.source == "emoji"
    assert trial.run.steps <= 50
    assert trial.run.workdir == f"{config.run.workdir}_trial"
    if isinstance(trial, ClassConditionalTraining):
        assert trial.tokenizer == "emoji"
        embedded = model_lookup.read_config("emoji").config["tokenizer"]
        assert trial.model.tokenizer == from_dict(TokenizerConfig, embedded)
        assert trial.model.tokens_per_step == config.model.tokens_per_step
    if isinstance(trial, TextToImageTraining):
        assert (trial.tokenizer, trial.text_tokenizer, trial.init) == ("emoji", "bytes", None)
        assert trial.model.tokens_per_step == config.model.tokens_per_step
        return
    # Its images are those of the average, of which the initial weights are a small part.
    assert trial.optimizer.ema_decay**trial.run.steps < 0.02


def test_another_kind_of_run_has_no_trial():
    config, _ = load_config("emoji_tokenizer")
    with pytest.raises(ConfigError, match="trial"):
        TrainingConfig(run=config.run).trial()


def test_parameters_of_a_config_are_flags():
    flags = ["--model", "l", "--tokens-per-step=4", "--model.num-classes", "3"]
    config, rest = load_config("imagenet", flags)
    assert config.model == ClassConditionalConfig.imagenet("l_4x")
    assert rest == ["--model.num-classes", "3"]
    config, _ = load_config("imagenet_h_1x", ["--tokens-per-step", "16"])
    assert config.model == ClassConditionalConfig.imagenet("h_16x")
    with pytest.raises(ConfigError, match="--model"):
        load_config("imagenet", ["--model", "xl"])


def test_a_path_in_configs_is_a_shipped_config_unless_there_is_such_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/emoji_4x.py") == load_config("emoji_4x")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "emoji_4x.py").write_text("")
    with pytest.raises(FileError, match="no function get_config") as caught:
        load_config("configs/emoji_4x.py")
    assert caught.value.path == "configs/emoji_4x.py"


def test_an_unknown_config_names_the_nearest():
    with pytest.raises(FileError, match="imagenet_l_2x; did you mean imagenet_l_1x"):
        load_config("imagenet_l_2x")


def test_the_second_stage_of_a_tokenizer():
    """First a plain decoder of the paper's sizes, then a GAN decoder on its encoder."""
    first, _ = load_config("tokenizer_d32c128")
    second, _ = load_config("tokenizer_d32c128", ["--stage", "2"])
    assert (first.model.decoder, second.model.decoder) == ("plain", "gan")
    assert second.model == TokenizerConfig.d32c128()
    assert first.train_encoder and not second.train_encoder
    assert second.run.workdir != first.run.workdir
    assert second.init == f"{first.run.workdir}/model"


@pytest.mark.parametrize(
    ("stage", "learning_rate", "warmup", "steps", "images", "resolutions"),
    [
        ("pretrain", 1e-4, 2000, 100_000, 2560, {256: 2, 512: 7, 1024: 1}),
        ("continue", 1e-4, 1000, 40_000, 2480, {512: 1, 1024: 1}),
        ("finetune", 2e-5, 500, 40_000, 2320, {512: 1, 1024: 1}),
        ("distill", 2e-5, 500, 20_000, 1536, {1024: 1}),
    ],
)
def test_a_text_to_image_config_is_a_stage_of_table_4(
    stage, learning_rate, warmup, steps, images, resolutions
):
    name = "t2i_14b_64x" if stage == "distill" else "t2i_14b_16x"
    config, _ = load_config(name, ["--stage", stage])
    assert config.model == TextToImageConfig.released(name.removeprefix("t2i_"))
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_steps, config.run.steps) == (
        learning_rate,
        warmup,
        steps,
    )
    assert (optimizer.schedule, optimizer.b1, optimizer.b2, optimizer.eps) == (
        "constant",
        0.9,
        0.95,
        1e-15,
    )
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.ema_decay) == (0, 1, None)
    data = config.data
    assert dict(zip(data.resolutions, data.resolution_weights, strict=True)) == resolutions
    assert (data.text_drop, config.flip_rate) == (0.1, 0.1)
    assert (config.vision_weight, config.text_weight) == (1.0, 0.01)
    # Tokens of an image, with its caption and what is around it.
    mean = sum(side**2 / 256 * share for side, share in resolutions.items())
    each = mean / sum(resolutions.values()) + 100
    assert data.batch_size * data.packing.target / each == pytest.approx(images, rel=0.08)


def test_distillation_makes_a_64x_model():
    config, _ = load_config("t2i_14b_64x", ["--stage", "distill"])
    assert (config.init, config.model.tokens_per_step) == ("models/14b_16x", 64)
