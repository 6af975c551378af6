"""Key tables: every released key leads to a parameter, and back."""

import jax
import numpy as np
import pytest
from golden_models import manifest

from bitdance_jax.config import ClassConditionalConfig, TextToImageConfig, TokenizerConfig
from bitdance_jax.convert import keys
from bitdance_jax.errors import FileError
from bitdance_jax.models import class_conditional, text_to_image
from bitdance_jax.nn.stack import unstack
from bitdance_jax.tokenizer import autoencoder


def converted_shapes(shapes: dict[str, list[int]], table: keys.Table) -> dict:
    """The shapes of our parameters. Each array is one byte in memory."""
    state = {key: np.broadcast_to(np.int8(0), shape) for key, shape in shapes.items()}
    return jax.tree.map(np.shape, keys.convert(state, table))


def unrolled_shapes(abstract: dict) -> dict:
    return jax.tree.map(np.shape, jax.eval_shape(unstack, abstract))


@pytest.fixture(scope="module")
def d16c32() -> dict:
    return jax.tree.map(np.shape, autoencoder.abstract_params(TokenizerConfig.d16c32()))


@pytest.mark.parametrize("name", ["B_1x", "B_4x", "B_16x", "L_1x", "H_1x"])
def test_released_class_conditional_models(name, d16c32):
    """The keys of the file, its tokenizer's included, are exactly our parameters."""
    shapes = manifest()[f"BitDance_{name}"]
    tokenizer = {
        key.removeprefix("vae."): shape for key, shape in shapes.items() if key.startswith("vae.")
    }
    assert converted_shapes(tokenizer, keys.CNN_TOKENIZER) == d16c32

    config = ClassConditionalConfig.imagenet(name)
    rest = {key: shape for key, shape in shapes.items() if not key.startswith("vae.")}
    assert converted_shapes(rest, keys.class_conditional(config)) == unrolled_shapes(
        class_conditional.abstract_params(config)
    )


@pytest.mark.parametrize("name", ["14b_16x", "14b_64x"])
def test_released_text_to_image_models(name, d16c32):
    config = TextToImageConfig.released(name)
    released = manifest()
    assert converted_shapes(released["BitDance-14B/ae"], keys.CNN_TOKENIZER) == d16c32
    parts = {part: released[f"BitDance-14B/{part}"] for part in ("vision_head", "projector")}
    shapes = {
        f"{part}.{key}": shape for part, shapes in parts.items() for key, shape in shapes.items()
    }
    # The manifest is of the 64x model, whose vocabulary has 48 more query tokens.
    rows = {"model.embed_tokens.weight", "lm_head.weight"}
    shapes |= {
        key: [config.text.vocab_size, *shape[1:]] if key in rows else shape
        for key, shape in released["BitDance-14B/llm"].items()
    }
    assert converted_shapes(shapes, keys.text_to_image(config)) == unrolled_shapes(
        text_to_image.abstract_params(config)
    )


def test_all_unknown_keys_are_listed():
    state = {
        name: np.zeros(3)
        for name in ("encoder.norm_out.weight", "encoder.attention.weight", "discriminator.bias")
    }
    with pytest.raises(FileError) as error:
        keys.convert(state, keys.CNN_TOKENIZER)
    assert "encoder.attention.weight" in str(error.value)
    assert "discriminator.bias" in str(error.value)


def test_patterns_match_complete_keys():
    state = {
        "vae.encoder.conv_in.weight": np.zeros(1),
        "encoder.conv_in.weight.bias": np.zeros(1),
    }
    with pytest.raises(FileError, match=r"vae\.encoder.*; .*weight\.bias"):
        keys.convert(state, keys.CNN_TOKENIZER)


def test_two_keys_for_one_parameter():
    table = (keys.Row(r"(?:ema|model)\.(\w+)\.weight", r"\1/weight"),)
    with pytest.raises(FileError, match=r"a/scale: model\.a\.weight"):
        keys.convert(
            {
                "ema.a.weight": np.zeros(3),
                "model.a.weight": np.zeros(3),
                "model.b.weight": np.zeros(3),
            },
            table,
        )


def test_layouts():
    """[out, in] is [in, out], [out, in, h, w] is [h, w, in, out], and a vector is a scale."""
    rng = np.random.default_rng(0)
    linear = rng.normal(size=(4, 3))
    convolution = rng.normal(size=(4, 3, 2, 1))
    norm = rng.normal(size=5)
    table = (keys.Row(r"(\w+)\.weight", r"\1/weight"),)
    params = keys.convert(
        {"linear.weight": linear, "convolution.weight": convolution, "norm.weight": norm}, table
    )
    np.testing.assert_array_equal(params["linear"]["kernel"], linear.T)
    np.testing.assert_array_equal(params["convolution"]["kernel"][1, 0], convolution[:, :, 1, 0].T)
    np.testing.assert_array_equal(params["norm"]["scale"], norm)


def test_pairs_to_halves():
    np.testing.assert_array_equal(keys.pairs_to_halves(np.arange(8)), [0, 2, 4, 6, 1, 3, 5, 7])
    np.testing.assert_array_equal(
        keys.halves_to_pairs(keys.pairs_to_halves(np.arange(24).reshape(3, 8))),
        np.arange(24).reshape(3, 8),
    )


def test_release_key():
    config = ClassConditionalConfig.imagenet("b_16x")
    table = keys.class_conditional(config)
    single = keys.class_conditional(ClassConditionalConfig.imagenet("b_1x"))
    for path, rows, expected in (
        ("transformer/layers_13/mlp/w1/kernel", table, "layers.13.feed_forward.w1.weight"),
        ("head/groups_1/blocks_2/mlp_norm/scale", table, "head.net.res_blocks.5.norm2.weight"),
        ("head/groups_1/blocks_2/mlp_norm/scale", single, "head.net.res_blocks.5.norm.weight"),
    ):
        assert keys.release_key(path, rows)[0] == expected
    key, row = keys.release_key("transformer/layers_3/attention/qkv/kernel", table)
    assert key == "layers.3.attention.wqkv.weight"
    qkv = np.random.default_rng(0).standard_normal((3 * 768, 5))
    np.testing.assert_array_equal(
        keys.to_release(keys.to_ours(qkv, row, "kernel"), row, "kernel"), qkv
    )
    with pytest.raises(ValueError, match="transformer/layers_3/attention/gate/kernel"):
        keys.release_key("transformer/layers_3/attention/gate/kernel", table)
