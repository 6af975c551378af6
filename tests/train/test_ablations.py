"""Other heads and continuous latents from training to samples, and the ablations' configs."""

import dataclasses

import numpy as np
import pytest
import tiny_models
from short_training import ROWS, SIZE, evaluate, train

import bitdance_jax
from bitdance_jax.cli.config_file import load_config
from bitdance_jax.config import (
    AugmentConfig,
    BitwiseHeadConfig,
    ConfigError,
    FlowHeadConfig,
    RunConfig,
    TokenClassificationHeadConfig,
    TokenizerConfig,
    TokenizerLossConfig,
)
from bitdance_jax.data.config import DataConfig
from bitdance_jax.errors import UserError
from bitdance_jax.io import model_lookup
from bitdance_jax.train.class_conditional_training import (
    ClassConditionalTask,
    ClassConditionalTraining,
)
from bitdance_jax.train.tokenizer_training import TokenizerTask, TokenizerTraining


pytestmark = pytest.mark.usefixtures("few_emoji")

DATA = DataConfig(batch_size=16, augment=AugmentConfig(min_crop=1.0, flip=0.0))
CONTINUOUS = TokenizerConfig(
    bits=4, ch=32, ch_mult=(1, 1), num_res_blocks=1, num_codebooks=1, latents="continuous"
)


def trained_model(root, tokenizer_folder, model, *, cache_latents, steps):
    """The held-out loss before and after some steps, and the exported model as a pipeline."""
    config = ClassConditionalTraining(
        run=RunConfig(workdir=str(root / "run"), steps=steps),
        model=model,
        tokenizer=str(tokenizer_folder),
        data=dataclasses.replace(DATA, cache_latents=cache_latents),
        preview=tiny_models.SAMPLER,
    )
    task = ClassConditionalTask(config)
    state, losses = train(task, 3e-3, steps=steps)
    task.export(state.params, str(root / "model"), step=steps, metrics={})
    return losses, bitdance_jax.load(root / "model")


@pytest.mark.slow
def test_a_classification_head_trains_and_samples(tmp_path):
    """The bit-wise one takes the same path; both have their own tests in heads/."""
    head = TokenClassificationHeadConfig(width=32)
    folder = tiny_models.save_tokenizer(tmp_path / "tokenizer")
    model = dataclasses.replace(tiny_models.MODEL, head=head)
    losses, pipeline = trained_model(tmp_path, folder, model, cache_latents=False, steps=12)
    assert losses[0] == pytest.approx(np.log(2), abs=0.01) and losses[-1] < 0.98 * losses[0]
    assert pipeline.config.head == head
    first = pipeline.sample([0, 1, 2], 5, progress=False)
    assert first.shape == (3, SIZE, SIZE, 3)
    # Whatever the batch size.
    np.testing.assert_array_equal(first[2:], pipeline.sample([2], 5, first_index=2, progress=False))


@pytest.fixture(scope="module")
def continuous_tokenizer(tmp_path_factory):
    """A trained tokenizer of continuous latents: losses, held-out metrics and its folder."""
    folder = tmp_path_factory.mktemp("continuous") / "model"
    task = TokenizerTask(
        TokenizerTraining(
            run=RunConfig(workdir="unused", steps=12),
            model=CONTINUOUS,
            image_size=SIZE,
            data=DATA,
            loss=TokenizerLossConfig(kl=1e-4),
        )
    )
    state, losses = train(task, 2e-3, steps=12)
    metrics = evaluate(task, state.params)
    task.export(state.params, str(folder), step=12, metrics=metrics)
    return losses, metrics, folder, task.held_out(ROWS)


@pytest.mark.slow
def test_a_continuous_tokenizer_learns_and_scales_its_latents(continuous_tokenizer):
    losses, metrics, folder, held_out = continuous_tokenizer
    assert losses[-1] < 0.7 * losses[0]
    assert set(metrics) >= {"psnr", "ssim", "latent_std"}
    tokenizer = bitdance_jax.Tokenizer.load(folder)
    assert tokenizer.config.latent_scale == float(f"{1 / metrics['latent_std']:.4g}")
    images = next(held_out)["image"]
    latents = tokenizer.encode(images)
    assert latents.dtype == np.float32 and latents.shape == (16, 8, 8, 4)
    assert np.std(latents) == pytest.approx(1, rel=0.2)
    decoded = tokenizer.decode(latents)
    error = np.mean(np.square((decoded - images.astype(np.float32)) / 255))
    assert -10 * np.log10(error) == pytest.approx(metrics["psnr"], abs=2)
    with pytest.raises(UserError, match="finite numbers"):
        tokenizer.decode(latents * np.nan)


@pytest.mark.slow
def test_the_diffusion_head_learns_continuous_latents(continuous_tokenizer, tmp_path):
    folder = continuous_tokenizer[2]
    config = TokenizerConfig(**model_lookup.read_config(folder).config)
    model = dataclasses.replace(tiny_models.MODEL, tokenizer=config)
    losses, pipeline = trained_model(tmp_path, folder, model, cache_latents=True, steps=4)
    assert losses[-1] < losses[0]
    options = {"progress": False, "output": "codes"}
    latents = pipeline.sample([0, 1, 2], 3, **options)
    assert latents.dtype == np.float32 and latents.shape == (3, 8, 8, 4)
    assert len(np.unique(np.abs(latents))) > 0.99 * latents.size  # nothing is rounded to a sign
    images = pipeline.sample([0, 1, 2], 3, progress=False)
    np.testing.assert_array_equal(images, pipeline.tokenizer.decode(latents))
    *_, last = pipeline.sample_steps([0, 1, 2], 3, every=8)
    np.testing.assert_array_equal(last.images, images)


@pytest.mark.parametrize(
    "flags, changes",
    [
        (["baseline"], {}),
        (["bitwise"], {"head": BitwiseHeadConfig(768)}),
        (["causal", "--tokens-per-step", "4"], {"mask": "causal", "tokens_per_step": 4}),
        (["token_raster", "--tokens-per-step", "4"], {"order": "token", "tokens_per_step": 4}),
        (["continuous"], {"tokenizer": TokenizerConfig.kl16()}),
    ],
)
def test_ablations_differ_from_the_paper_in_what_they_name(flags, changes):
    config, rest = load_config("imagenet", ["--ablation", *flags])
    paper, _ = load_config("imagenet_b_1x")
    assert rest == [] and config.run.steps == 400 * 1_281_167 // 1024
    assert config.model == dataclasses.replace(paper.model, **changes)
    assert config.optimizer == paper.optimizer and config.data.augment.decay_end == 375
    assert config.run.workdir.endswith(flags[0])
    assert config.tokenizer == ("models/kl16" if flags == ["continuous"] else paper.tokenizer)
    config.make_objective().abstract_batch(1024)


def test_ablations_that_cannot_be():
    with pytest.raises(ConfigError, match=r"^head of the kind token_classification has 2\^32"):
        load_config("imagenet", ["--ablation", "token_classification"])
    with pytest.raises(ConfigError, match="ablation causal makes no difference"):
        load_config("imagenet", ["--ablation", "causal"])
    config, _ = load_config("imagenet", ["--ablation", "continuous"])
    with pytest.raises(ConfigError, match="no trial on continuous latents"):
        config.trial()


@pytest.mark.parametrize("head", ["bitwise", "token_classification"])
def test_the_emoji_model_with_another_head(head):
    config, _ = load_config("emoji_4x", ["--head", head])
    assert config.model.head.kind == head and config.run.workdir == f"runs/emoji_4x_{head}"
    paper, _ = load_config("emoji_4x")
    assert isinstance(paper.model.head, FlowHeadConfig)
