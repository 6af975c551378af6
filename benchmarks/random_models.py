"""Models of released sizes with random weights, which the benchmarks of speed share."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bitdance_jax.config import (
    ClassConditionalConfig,
    FlowHeadConfig,
    Qwen3Config,
    TextToImageConfig,
    TokenizerConfig,
    TransformerConfig,
)
from bitdance_jax.errors import UserError
from bitdance_jax.models import text_to_image
from bitdance_jax.pipelines import toy_text_to_image
from bitdance_jax.pipelines.weights import stored_as
from bitdance_jax.tokenizer import autoencoder


def class_conditional_config(name: str, trial: bool) -> ClassConditionalConfig:
    """A released model of ImageNet; with `trial` a toy with its tokens per step."""
    config = ClassConditionalConfig.imagenet(name)
    if not trial:
        return config
    return dataclasses.replace(
        config,
        tokenizer=toy_tokenizer(),
        transformer=TransformerConfig(num_layers=2, dim=64, num_heads=2),
        head=FlowHeadConfig(width=64, num_blocks=2, num_groups=1),
        image_size=128,
    )


def toy_tokenizer() -> TokenizerConfig:
    return dataclasses.replace(TokenizerConfig.d16c32(), ch=32, num_res_blocks=1)


def text_to_image_config(name: str, trial: bool) -> TextToImageConfig:
    """A released model, "14b_16x", or the same from another Qwen3, "0.6b_16x" to "32b_64x"; with
    `trial` a toy with its tokens per step."""
    size, _, tokens = name.partition("_")
    if tokens not in ("16x", "64x"):
        raise UserError(f"a text-to-image model is named as 14b_16x or 0.6b_64x, got {name!r}")
    text, parallel = Qwen3Config.released(size), int(tokens[:-1])
    if trial:
        return toy_text_to_image.config(parallel)
    return TextToImageConfig.from_language_model(text, TokenizerConfig.d16c32(), parallel)


def random_arrays(tree: Any, dtype_of: Callable[[tuple[str, ...]], Any]) -> Any:
    """Unrolled weights, normal with the scale that keeps activations near 1, made on the device."""

    def make(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        names = tuple(part.key for part in path)
        return normal(leaf.shape, jnp.dtype(dtype_of(names)))

    return jax.tree_util.tree_map_with_path(make, tree)


def normal(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    inputs = shape[:-1] if len(shape) == 4 else shape[:1]  # convolutions, or other kernels
    scale = math.prod(inputs) ** -0.5 if len(shape) > 1 else 1.0
    return _filled(_random_numbers(), scale, shape, dtype)


@functools.cache
def _random_numbers() -> jax.Array:
    """Numbers that all weights repeat: a generator for every shape would take half a minute."""
    return jax.random.normal(jax.random.key(0), (2**26,), jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _filled(
    numbers: jax.Array, scale: float, shape: tuple[int, ...], dtype: jnp.dtype
) -> jax.Array:
    return (scale * jnp.resize(numbers, shape)).astype(dtype)


def prompt_weights(config: TextToImageConfig, mesh: Any, dtype: jnp.dtype, weights: str) -> Any:
    """Random weights, kept as `TextToImage` keeps them."""
    abstract = {
        "model": text_to_image.abstract_params(config, scan=False),
        "tokenizer": autoencoder.abstract_params(config.tokenizer),
    }

    def make(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        names = tuple(part.key for part in path)
        how = stored_as(mesh, names, leaf.shape, dtype, weights)
        if how is None:
            return None
        array = jax.device_put(normal(leaf.shape, how.dtype), how.sharding)
        return how.store(names, array)

    def drop(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return {name: drop(value) for name, value in tree.items() if not _empty(value)}

    return drop(jax.tree_util.tree_map_with_path(make, abstract))


def _empty(tree: Any) -> bool:
    return tree is None or (isinstance(tree, dict) and all(map(_empty, tree.values())))
