"""A text-to-image model folder at toy size, for first steps and tests.

It has all that a converted release has, the prompt tokenizer included, but random weights: its
images are noise.
"""

import os
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from bitdance_jax.config import (
    FlowHeadConfig,
    ImageTokens,
    Qwen3Config,
    SamplerConfig,
    TextToImageConfig,
    TokenizerConfig,
    to_dict,
)
from bitdance_jax.io import model_folder
from bitdance_jax.models import text_to_image
from bitdance_jax.nn.stack import stacked_axes
from bitdance_jax.text import prompt_tokenizer
from bitdance_jax.tokenizer import autoencoder


RESOLUTIONS = 64
"""Sides up to 1024 pixels."""

SAMPLER = SamplerConfig(head_steps=4, guidance_scale=2.0, guidance_schedule="constant")


def config(tokens_per_step: int = 4) -> TextToImageConfig:
    """Sizes of a toy model; one of its tokens is 16 pixels wide, as in the released ones."""
    first = len(ByteLevel.alphabet())
    queries = first + 4 + RESOLUTIONS
    # Files without queries name no first one.
    ids = ImageTokens(first + 2, first + 4, RESOLUTIONS, queries if tokens_per_step > 1 else 0)
    return TextToImageConfig(
        tokenizer=TokenizerConfig(
            bits=8, ch=32, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, num_codebooks=2
        ),
        text=Qwen3Config(
            num_layers=2,
            dim=64,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            hidden_dim=96,
            vocab_size=queries + tokens_per_step - 1,
        ),
        head=FlowHeadConfig(
            width=128, num_blocks=4, num_groups=2, head_dim=128, squash_output=True
        ),
        image_tokens=ids,
        tokens_per_step=tokens_per_step,
    )


def save(
    folder: str | os.PathLike[str],
    config: TextToImageConfig,
    seed: int = 0,
    *,
    force: bool = False,
) -> None:
    """Writes the model folder of random weights, bfloat16 as in the released models.

    With `force` it replaces the model that is there.
    """
    model_folder.check_writable(folder, force=force)
    abstract = {
        "model": text_to_image.abstract_params(config),
        "tokenizer": autoencoder.abstract_params(config.tokenizer),
    }
    model_folder.save(
        folder,
        kind="text_to_image",
        config=to_dict(config),
        params=random_params(abstract, seed),
        metadata={"source": "random weights", "sampler": to_dict(SAMPLER)},
        files={
            f"{prompt_tokenizer.FOLDER}/tokenizer.json": tokenizer_json(
                config.tokens_per_step
            ).encode()
        },
        force=force,
    )


def random_params(abstract: Any, seed: int = 0) -> Any:
    """Random bfloat16 parameters of the shapes of a pytree.

    Kernels are normal / sqrt(inputs), scales near 1 and all others near 0.
    """
    rng = np.random.default_rng(seed)

    def sample(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.standard_normal(leaf.shape)
        names = tuple(part.key for part in path)
        if names[-1] == "kernel":
            values /= np.sqrt(np.prod(leaf.shape[stacked_axes(names) : -1]))
        else:
            values = 0.1 * values + (names[-1] == "scale")
        return values.astype(ml_dtypes.bfloat16)

    return jax.tree_util.tree_map_with_path(sample, abstract)


def tokenizer_json(tokens_per_step: int) -> str:
    """A byte-level BPE without merges, and the special tokens of a released model."""
    tokenizer = tokenizers.Tokenizer(
        BPE({byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += [f"<|res_{n}|>" for n in range(1, RESOLUTIONS + 1)]
    special += [f"<|query_{n}|>" for n in range(1, tokens_per_step)]
    tokenizer.add_special_tokens(special)
    return tokenizer.to_str()
