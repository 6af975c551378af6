import jax
import numpy as np
import pytest
from golden_models import manifest

from bitdance_jax.config import ClassConditionalConfig, TextToImageConfig, TokenizerConfig
from bitdance_jax.convert import keys
from bitdance_jax.errors import UserError
from bitdance_jax.models import class_conditional, text_to_image
from bitdance_jax.nn.stack import unstack
from bitdance_jax.tokenizer import autoencoder


def converted_shapes(shapes: dict[str, list[int]], table: keys.Table) -> dict:
    """Of a state dict of these shapes, made of one byte each as long as nothing copies it."""
    state = {key: np.broadcast_to(np.int8(0), shape) for key, shape in shapes.items()}
    return jax.tree.map(np.shape, keys.convert(state, table))


def unrolled_shapes(abstract: dict) -> dict:
    return jax.tree.map(np.shape, jax.eval_shape(unstack, abstract))


@pytest.fixture(scope="module")
def d16c32() -> dict:
    return jax.tree.map(np.shape, autoencoder.abstract_params(TokenizerConfig.d16c32()))


@pytest.mark.parametrize("name", ["B_1x", "B_4x", "B_16x", "L_1x", "H_1x"])
def test_released_class_conditional_models(name, d16c32):
    """Every key of the file, the tokenizer's with them, is one of our parameters, and the other way round."""
    shapes = manifest()[f"BitDance_{name}"]
    tokenizer = {
        key.removeprefix("vae."): shape for key, shape in shapes.items() if key.startswith("vae.")
    }
    assert converted_shapes(tokenizer, keys.TOKENIZER) == d16c32

    config = ClassConditionalConfig.imagenet(name)
    rest = {key: shape for key, shape in shapes.items() if not key.startswith("vae.")}
    assert converted_shapes(rest, keys.class_conditional(config)) == unrolled_shapes(
        class_conditional.abstract_params(config)
    )


@pytest.mark.parametrize("name", ["14b_16x", "14b_64x"])
def test_released_text_to_image_models(name, d16c32):
    config, released = TextToImageConfig.released(name), manifest()
    assert converted_shapes(released["BitDance-14B/ae"], keys.TOKENIZER) == d16c32
    parts = {part: released[f"BitDance-14B/{part}"] for part in ("vision_head", "projector")}
    shapes = {
        f"{part}.{key}": shape for part, shapes in parts.items() for key, shape in shapes.items()
    }
    # The manifest is of the 64x model, whose vocabulary has 48 more queries.
    rows = {"model.embed_tokens.weight", "lm_head.weight"}
    shapes |= {
        key: [config.text.vocab_size, *shape[1:]] if key in rows else shape
        for key, shape in released["BitDance-14B/llm"].items()
    }
    assert converted_shapes(shapes, keys.text_to_image(config)) == unrolled_shapes(
        text_to_image.abstract_params(config)
    )


def test_unknown_keys_are_listed_all_at_once():
    state = {
        name: np.zeros(3)
        for name in ("encoder.norm_out.weight", "encoder.attention.weight", "discriminator.bias")
    }
    with pytest.raises(UserError) as error:
        keys.convert(state, keys.TOKENIZER)
    assert (
        str(error.value) == "unknown key encoder.attention.weight; unknown key discriminator.bias"
    )


def test_patterns_match_whole_keys():
    with pytest.raises(
        UserError,
        match=r"unknown key vae.encoder.conv_in.weight; unknown key encoder.conv_in.weight.bias",
    ):
        keys.convert(
            {"vae.encoder.conv_in.weight": np.zeros(1), "encoder.conv_in.weight.bias": np.zeros(1)},
            keys.TOKENIZER,
        )


def test_two_keys_for_one_parameter():
    table = (keys.Row(r"(?:ema|model)\.(\w+)\.weight", r"\1/weight"),)
    with pytest.raises(UserError, match=r"a second key for a/scale: model\.a\.weight"):
        keys.convert(
            {
                "ema.a.weight": np.zeros(3),
                "model.a.weight": np.zeros(3),
                "model.b.weight": np.zeros(3),
            },
            table,
        )


def test_layouts():
    """[out, in] becomes [in, out], [out, in, h, w] becomes [h, w, in, out], one dimension a scale."""
    rng = np.random.default_rng(0)
    linear, convolution, norm = (
        rng.normal(size=(4, 3)),
        rng.normal(size=(4, 3, 2, 1)),
        rng.normal(size=5),
    )
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


def test_rows_read_both_ways():
    config = ClassConditionalConfig.imagenet("b_16x")
    table = keys.class_conditional(config)
    assert (
        keys.release_key("transformer/layers_13/mlp/w1/kernel", table)[0]
        == "layers.13.feed_forward.w1.weight"
    )
    assert (
        keys.release_key("head/groups_1/blocks_2/mlp_norm/scale", table)[0]
        == "head.net.res_blocks.5.norm2.weight"
    )
    single = keys.class_conditional(ClassConditionalConfig.imagenet("b_1x"))
    assert (
        keys.release_key("head/groups_1/blocks_2/mlp_norm/scale", single)[0]
        == "head.net.res_blocks.5.norm.weight"
    )
    key, row = keys.release_key("transformer/layers_3/attention/qkv/kernel", table)
    assert key == "layers.3.attention.wqkv.weight"
    qkv = np.random.default_rng(0).standard_normal((3 * 768, 5))
    np.testing.assert_array_equal(
        keys.to_release(keys.to_ours(qkv, row, "kernel"), row, "kernel"), qkv
    )
    with pytest.raises(
        ValueError,
        match="no row of the key table leads to transformer/layers_3/attention/gate/kernel",
    ):
        keys.release_key("transformer/layers_3/attention/gate/kernel", table)
