"""Configs of the official full-size models, from shapes alone: nothing is allocated."""

import dataclasses

import numpy as np
import pytest
from golden_models import manifest

from bitdance_jax.config import ClassConditionalConfig, TokenizerConfig
from bitdance_jax.convert import keys, parameters, released_configs
from bitdance_jax.errors import FileError
from bitdance_jax.io.lazy_array import LazyArray
from bitdance_jax.models import class_conditional
from bitdance_jax.tokenizer import autoencoder


def official(name: str, vae: bool) -> dict[str, tuple[int, ...]]:
    shapes = {key: tuple(shape) for key, shape in manifest()[name].items()}
    return {
        key.removeprefix("vae."): shape
        for key, shape in shapes.items()
        if key.startswith("vae.") == vae
    }


def unread_arrays(shapes: dict[str, tuple[int, ...]]) -> dict[str, LazyArray]:
    return {
        key: LazyArray(shape, np.dtype(np.float32), lambda: pytest.fail("read"))
        for key, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("name", "scale"), [("B_1x", 3.2), ("B_4x", 3.9), ("B_16x", 6.1), ("L_1x", 4.0), ("H_1x", 4.55)]
)
def test_published_models(name, scale):
    """The config, the keys in both directions, and the sampler of the evaluation."""
    tokenizer = released_configs.tokenizer_config(official(f"BitDance_{name}", vae=True), {})
    assert tokenizer == TokenizerConfig.d16c32()
    assert parameters.release_shapes(
        autoencoder.abstract_params(tokenizer), keys.CNN_TOKENIZER
    ) == official(f"BitDance_{name}", vae=True)

    shapes = official(f"BitDance_{name}", vae=False)
    config = released_configs.class_conditional_config(shapes, {}, tokenizer)
    assert config == ClassConditionalConfig.imagenet(name)
    table = keys.class_conditional(config)
    abstract = class_conditional.abstract_params(config)
    assert parameters.release_shapes(abstract, table) == shapes
    assert parameters.problems(unread_arrays(shapes), abstract, table) == []
    params = parameters.from_release(unread_arrays(shapes), abstract, table)
    assert parameters.num_bytes(params) == 4 * sum(int(np.prod(shape)) for shape in shapes.values())

    known, sampler = released_configs.published(dataclasses.replace(config, bit_flip_rate=0.3))
    assert known == f"BitDance_{name}"
    assert (sampler.guidance_scale, sampler.guidance_schedule, sampler.head_steps) == (
        scale,
        "linear",
        100,
    )
    assert released_configs.published(dataclasses.replace(config, num_classes=10)) is None


@pytest.mark.parametrize("size", ["B", "L", "H"])
@pytest.mark.parametrize("parallel", ["1x", "4x", "16x"])
def test_every_size_and_patch_size(size, parallel):
    """L and H with patches are not published: their keys are ours."""
    config = ClassConditionalConfig.imagenet(f"{size}_{parallel}")
    table = keys.class_conditional(config)
    abstract = class_conditional.abstract_params(config)
    shapes = parameters.release_shapes(abstract, table)
    assert released_configs.class_conditional_config(shapes, {}, config.tokenizer) == config
    assert parameters.problems(unread_arrays(shapes), abstract, table) == []


@pytest.mark.parametrize("config", [TokenizerConfig.d16c32(), TokenizerConfig.d32c128()])
def test_released_tokenizers(config):
    shapes = parameters.release_shapes(autoencoder.abstract_params(config), keys.CNN_TOKENIZER)
    assert released_configs.tokenizer_config(shapes, {}) == config


def test_impossible_shapes():
    shapes = official("BitDance_B_4x", vae=False)
    tokenizer = TokenizerConfig.d16c32()
    for wrong, message in (
        ({"pos_for_diff.weight": (255, 768)}, r"\[255, 768\]"),
        ({"pos_for_diff.weight": (256,)}, r"pos_for_diff\.weight .* \[256\]"),
        ({"layers.999999999.ffn_norm.weight": (768,)}, "999999999"),
    ):
        with pytest.raises(FileError, match=message):
            released_configs.class_conditional_config(shapes | wrong, {}, tokenizer)
    del shapes["pos_for_diff.weight"]
    with pytest.raises(FileError, match=r"pos_for_diff\.weight"):
        released_configs.class_conditional_config(shapes, {}, tokenizer)


@pytest.mark.parametrize("value", [10**400, -(10**30), float("nan"), float("-inf"), 1e300])
def test_impossible_recorded_numbers(value):
    with pytest.raises(FileError, match="P_mean"):
        released_configs.recorded({"P_mean": value}, "P_mean", -0.8)
    assert released_configs.recorded({"P_mean": [value]}, "P_mean", -0.8) == -0.8
