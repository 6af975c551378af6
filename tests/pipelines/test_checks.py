"""Bad arguments of public methods are errors of one line, before anything compiles."""

import importlib.util

import ml_dtypes
import numpy as np
import pytest
import tiny_models

import bitdance_jax
from bitdance_jax.errors import UserError
from bitdance_jax.pipelines import toy_text_to_image
from bitdance_jax.pipelines.class_conditional import ClassConditionalPipeline
from bitdance_jax.pipelines.text_to_image import TextToImage
from bitdance_jax.pipelines.tokenizer import Tokenizer


pytestmark = pytest.mark.usefixtures("as_users_call")

IMAGES = np.zeros((2, 16, 16, 3), np.uint8)
CODES = np.ones((2, 8, 8, 8), np.int8)


@pytest.fixture(scope="module")
def model():
    tokenizer = Tokenizer(tiny_models.TOKENIZER, tiny_models.tokenizer_params())
    return ClassConditionalPipeline(
        tiny_models.MODEL, tiny_models.model_params(), tokenizer, sampler=tiny_models.SAMPLER
    )


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "toy"
    toy_text_to_image.save(folder, tiny_models.TEXT_TO_IMAGE)
    return TextToImage.load(folder, lazy=True)


def refused(call, match):
    with pytest.raises(UserError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (
            IMAGES.astype(np.float32) / 255,
            r"images must be uint8 \[B, H, W, 3\] .*got float32 \[2, 16, 16, 3\]",
        ),
        (IMAGES / 127.5 - 1, "got float64"),
        (IMAGES.astype(np.int64), "got int64"),
        (IMAGES > 0, "got bool"),
        (IMAGES[0], r"got uint8 \[16, 16, 3\]; for a single image, give image\[None\]"),
        (IMAGES[..., :1], r"got uint8 \[2, 16, 16, 1\]"),
        (IMAGES.transpose(0, 3, 1, 2), r"got uint8 \[2, 3, 16, 16\]"),
        (IMAGES[:, :0], r"got uint8 \[2, 0, 16, 3\]"),
        (IMAGES[:, :15], "sides divisible by 2, got 15x16"),
        ([[1, 2], [3]], "images must be uint8"),
        (["a.png"], "images must be uint8"),
        (None, "images must be uint8"),
    ],
)
def test_images_that_the_tokenizer_does_not_take(model, images, match):
    refused(lambda: model.tokenizer.encode(images), match)


@pytest.mark.parametrize(
    ("codes", "match"),
    [
        (
            0 * CODES,
            r"\[B, h, w, 8\], got 1024 other numbers, such as 0; ",
        ),
        (CODES * np.float32(0.5), "such as 0.5"),
        (CODES * np.float32(np.nan), "such as nan"),
        (np.full_like(CODES, -128), "such as -128"),
        (CODES > 0, "got bool"),
        (CODES[0], r"got int8 \[8, 8, 8\]"),
        (CODES[..., :4], r"got int8 \[2, 8, 8, 4\]"),
        (CODES[:, :0], r"got int8 \[2, 0, 8, 8\]"),
        (CODES[:, :1, :1], "one token is too small an image"),
        ("codes", "codes must be -1 or 1"),
        (None, "codes must be -1 or 1"),
    ],
)
def test_codes_that_the_tokenizer_does_not_take(model, codes, match):
    refused(lambda: model.tokenizer.decode(codes), match)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.float32, ml_dtypes.bfloat16])
def test_codes_of_any_type_of_numbers_are_the_same(model, dtype):
    codes = np.random.default_rng(0).choice([-1, 1], CODES.shape)
    np.testing.assert_array_equal(
        model.tokenizer.decode(codes.astype(dtype)), model.tokenizer.decode(codes.astype(np.int8))
    )


@pytest.mark.parametrize(
    ("labels", "options", "match"),
    [
        ([1.5], {}, "a label must be a number or a name, got 1.5"),
        ([1.0], {}, "a label must be a number or a name, got 1.0"),
        ([True], {}, "a label must be a number or a name, got True"),
        ([None], {}, "a label must be a number or a name, got None"),
        ([[1, 2]], {}, r"a label must be a number or a name, got \[1, 2\]"),
        (np.zeros((2, 2), int), {}, "a label must be a number or a name"),
        ([10**5000], {}, "label a number with too many digits is out of range"),
        ("12", {}, "label 12 is out of range"),
        (12, {}, "label 12 is out of range"),
        (np.array(12), {}, "label 12 is out of range"),
        (np.array([3, 12]), {}, "label 12 is out of range"),
        (range(10**12), {}, "labels may be at most 1,000,000"),
        ([0], {"size": "64x64"}, "own size, 16x16; omit size"),
        ([0], {"images_per_input": 0}, "images_per_input must be positive"),
        ([0], {"seed": 0.5}, "seed must be int, got 0.5"),
        ([0], {"seed": 2**32}, "seed must be between 0 and 4294967295, got 4294967296"),
        ([0], {"seed": "0"}, "seed must be int"),
        ([0], {"seed": [1, 2]}, "1 images, got 2 seeds"),
        ([0], {"seed": [2**32]}, "seed must be between"),
        ([0], {"batch_size": 2.0}, "batch_size must be int, got 2.0"),
        ([0], {"first_index": -1}, "first_index must be between 0 and 4294967295, got -1"),
        ([0, 1], {"first_index": 2**32 - 1}, "first_index must be between 0 and 4294967294"),
        ([0], {"first_index": 0.0}, "first_index must be int"),
        ([0], {"sampler": 50}, "sampler must be a SamplerConfig, got int"),
        (
            [0],
            {"sampler": {"guidance_scale": "high"}},
            r"sampler\.guidance_scale must be float, got 'high'",
        ),
    ],
)
def test_what_a_class_conditional_model_does_not_draw(model, labels, options, match):
    refused(lambda: model.sample(labels, **options), match)
    if "batch_size" not in options:
        refused(lambda: next(model.sample_steps(labels, every=1, **options)), match)


def test_steps_of_no_images(model):
    refused(lambda: next(model.sample_steps([], every=1)), "inputs is empty")


@pytest.mark.parametrize("every", [0, 1.0, None])
def test_steps_between_previews(model, prompts, every):
    refused(lambda: next(model.sample_steps([0], every=every)), "every must be")
    refused(lambda: next(prompts.sample_steps("a cat", every=every)), "every must be")


@pytest.mark.parametrize(
    ("prompt", "options", "match"),
    [
        (3, {}, r"prompt\[0\] must be str, got 3"),
        (["a cat", 3], {}, r"prompt\[1\] must be str, got 3"),
        ("a cat", {"size": (12.0, 8)}, r"size\[0\] must be int, got 12.0"),
        ("a cat", {"size": (12, 8, 3)}, "size must be WIDTHxHEIGHT"),
        ("a cat", {"size": 12}, "size must be WIDTHxHEIGHT .* got 12"),
        ("a cat", {"images_per_input": 1.5}, "images_per_input must be int, got 1.5"),
        ("a cat", {"batch_size": 1.5}, "batch_size must be int, got 1.5"),
        ("a cat", {"seed": 1.5}, "seed must be int, got 1.5"),
        ("a cat", {"first_index": 2**32}, "first_index must be between"),
        ("a cat", {"sampler": "euler"}, "sampler must be one of fast, got 'euler'"),
    ],
)
def test_what_a_text_to_image_model_does_not_draw(prompts, prompt, options, match):
    refused(lambda: prompts.sample(prompt, **({"size": "12x8"} | options)), match)


@pytest.mark.parametrize("dtype", ["float16", "int8", "float", 5, "half a float"])
def test_other_compute_types(prompts, dtype):
    match = "dtype must be one of float32, bfloat16, got ('float|'int8'|5|'half a float')"
    refused(lambda: bitdance_jax.load(dtype=dtype), match)
    refused(lambda: Tokenizer(tiny_models.TOKENIZER, {}, dtype), match)
    refused(lambda: TextToImage.load(prompts._folder, dtype=dtype), match)


def test_other_arguments_of_models(model, prompts):
    refused(
        lambda: TextToImage.load(prompts._folder, weights="int3"),
        "weights must be one of float32, bfloat16, int8, fp8, int4, got 'int3'",
    )
    refused(
        lambda: TextToImage.load(prompts._folder, mesh="tensor"),
        "mesh must be a MeshConfig, got str",
    )
    for call in (bitdance_jax.load, Tokenizer.load, TextToImage.load):
        refused(lambda call=call: call(None), "folder must be str, got None")
        refused(lambda call=call: call(3), "folder must be str, got 3")
    refused(lambda: next(model.batches([0], batch_size=1.5)), "batch_size must be int, got 1.5")
    refused(
        lambda: ClassConditionalPipeline(
            tiny_models.MODEL, {}, model.tokenizer, class_names=list(range(9))
        ),
        "class_names.0. must be",
    )


@pytest.mark.parametrize("load", [bitdance_jax.load, TextToImage.load])
@pytest.mark.parametrize(
    ("place", "match"),
    [
        ("gs://bucket/model", "bitdance_jax\\[gcs\\]"),
        ("s3://bucket/model", "s3://bucket/model"),
        ("hf://owner/model", "bitdance convert"),
        ("~/no_model", "/home_of_tests/no_model"),
    ],
)
def test_places_of_models(load, place, match, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("HOME", "/home_of_tests")
    with pytest.raises(UserError, match=match):
        load(place)
