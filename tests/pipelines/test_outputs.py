"""Seeds, PIL images, and the text that goes into PNG files."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_models
from PIL import Image
from same_images import assert_same_images

from bitdance_jax import ClassConditionalPipeline, Tokenizer
from bitdance_jax.io.image_files import save_png
from bitdance_jax.pipelines.batching import image_keys
from bitdance_jax.pipelines.pipeline import common_description


@pytest.fixture(scope="module")
def model():
    params = tiny_models.tokenizer_params(tiny_models.GAN_TOKENIZER)
    return ClassConditionalPipeline(
        dataclasses.replace(tiny_models.MODEL, tokenizer=tiny_models.GAN_TOKENIZER),
        tiny_models.model_params(),
        Tokenizer(tiny_models.GAN_TOKENIZER, params),
        class_names=[f"class {i}" for i in range(8)] + ["猫"],
        sampler=tiny_models.SAMPLER,
        name="tiny",
    )


def test_keys():
    """One seed counts the indices; each of several seeds has the first index."""
    expected = jax.random.key_data(jax.random.fold_in(jax.random.key(2**32 - 1), 7))
    np.testing.assert_array_equal(jax.random.key_data(image_keys(2**32 - 1, 5, 3))[2], expected)
    several = jax.random.key_data(image_keys([3, 2**32 - 1], 7, 2))
    np.testing.assert_array_equal(several[1], expected)


@pytest.mark.parametrize("first_index", [0, 4])
def test_seeds_of_images(model, first_index):
    """Each image is the one that its seed alone gives, the noise of the GAN decoder included."""
    options = {"first_index": first_index, "batch_size": 2, "progress": False}
    images = model.sample([1, 1, 3], seed=[7, 8, 7], **options)
    for i, (label, seed) in enumerate([(1, 7), (1, 8), (3, 7)]):
        assert_same_images(images[i : i + 1], model.sample([label, label], seed, **options)[:1])


def test_a_single_input_and_repetition(model):
    options = {"seed": 2, "batch_size": 2, "progress": False}
    images = model.sample("猫", images_per_input=2, **options)
    np.testing.assert_array_equal(images, model.sample(["猫", 8], **options))


def test_other_scales_seeds_and_indices_compile_nothing(model):
    programs = model._execution.programs
    model.sample([0, 1], batch_size=2, progress=False)
    before = [f._cache_size() for f in (programs.sampler.advance, programs.decode)]
    stronger = dataclasses.replace(
        model.sampler, guidance_scale=5.0, guidance_schedule="constant", guidance_end=0.5
    )
    options = {"sampler": stronger, "batch_size": 2, "progress": False}
    model.sample([3, 1, 2], seed=[1, 2, 3], first_index=9, **options)
    list(model.sample_steps([4, 5], seed=1, every=3))
    assert [f._cache_size() for f in (programs.sampler.advance, programs.decode)] == before


def test_pil_images(model):
    options = {"seed": 2, "batch_size": 2, "progress": False}
    arrays = model.sample([0, "猫"], **options)
    images = model.sample([0, "猫"], output="pil", **options)
    assert all(isinstance(image, Image.Image) for image in images)
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), arrays)
    assert images[1].info["label"] == "猫" and images[1].info["index"] == "1"


def test_text_chunks(model, tmp_path):
    """What is written is read back; a grid has what its images share."""
    texts = model.metadata([0, "猫"], seed=5, first_index=3)
    save_png(tmp_path / "x.png", np.zeros((4, 4, 3), np.uint8), text=texts[1])
    with Image.open(tmp_path / "x.png") as image:
        assert (
            image.text
            == texts[1]
            == {
                "label": "猫",
                "seed": "5",
                "index": "4",
                "model": "tiny",
                "head_steps": "3",
                "solver": "euler_maruyama",
                "guidance_scale": "2.0",
                "guidance_schedule": "linear",
                "guidance_start": "0.0",
                "guidance_end": "1.0",
                "guidance_patch_start": "0.0",
                "guidance_patch_end": "1.0",
            }
        )
    common = common_description(texts)
    assert "label" not in common and "index" not in common and common["seed"] == "5"
