"""Models with random weights that can be sampled and trained within seconds."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from random_params import random_params

from bitdance_jax.config import (
    ClassConditionalConfig,
    FlowHeadConfig,
    SamplerConfig,
    TokenizerConfig,
    TransformerConfig,
    to_dict,
)
from bitdance_jax.io import model_folder
from bitdance_jax.models.class_conditional import ClassConditional, to_patches, training_noise
from bitdance_jax.pipelines import toy_text_to_image
from bitdance_jax.tokenizer.autoencoder import Autoencoder


TOKENIZER = TokenizerConfig(bits=8, ch=32, ch_mult=(1, 1), num_res_blocks=1, num_codebooks=2)
GAN_TOKENIZER = TokenizerConfig(
    bits=8, ch=32, ch_mult=(1, 1), num_res_blocks=1, num_codebooks=2, decoder="gan"
)

TEXT_TO_IMAGE = dataclasses.replace(
    toy_text_to_image.config(),
    tokenizer=TOKENIZER,
    head=FlowHeadConfig(width=32, num_blocks=1, num_groups=1, head_dim=16, squash_output=True),
)
"""Patches of 4 x 4 pixels."""

MODEL = ClassConditionalConfig(
    tokenizer=TOKENIZER,
    transformer=TransformerConfig(num_layers=2, dim=32, num_heads=2),
    head=FlowHeadConfig(width=32, num_blocks=2, num_groups=1, head_dim=16),
    num_classes=9,
    image_size=16,
    tokens_per_step=4,
    class_tokens=4,
    head_repeats=2,
)
SAMPLER = SamplerConfig(head_steps=3, guidance_scale=2.0)


def tokenizer_params(config: TokenizerConfig = TOKENIZER) -> dict:
    noise = jnp.zeros((1, 2, 2, config.bits)) if config.decoder == "gan" else None
    return random_params(Autoencoder(config), jnp.zeros((1, 4, 4, 3)), noise)


def model_params(config: ClassConditionalConfig = MODEL) -> dict:
    """Stacked, without the tokenizer."""
    bits = jnp.zeros((1, config.num_tokens, config.tokenizer.bits))
    noise = training_noise(jax.random.split(jax.random.key(0), 1), config).head
    return random_params(
        ClassConditional(config, scan=True),
        jnp.zeros((1,), jnp.int32),
        bits,
        to_patches(bits, config),
        noise,
    )


def save_tokenizer(folder: Path, config: TokenizerConfig = TOKENIZER) -> Path:
    model_folder.save(
        folder,
        kind="tokenizer",
        config=to_dict(config),
        params=tokenizer_params(config),
        metadata={},
    )
    return folder


def save_model(folder: Path, config: ClassConditionalConfig = MODEL, **metadata: object) -> Path:
    params = {"model": model_params(config), "tokenizer": tokenizer_params(config.tokenizer)}
    model_folder.save(
        folder, kind="class_conditional", config=to_dict(config), params=params, metadata=metadata
    )
    return folder
