"""Several conditions of an image, negative prompts, and guidance of some patches only."""

import dataclasses
import functools

import numpy as np
import pytest
import tiny_models

import bitdance_jax
from bitdance_jax import Given, SamplerConfig, Weighted
from bitdance_jax.errors import UserError
from bitdance_jax.pipelines import toy_text_to_image
from bitdance_jax.pipelines.image_prompts import ImagePrompt


SAMPLER = SamplerConfig(head_steps=2, guidance_scale=2.0, guidance_schedule="constant")
LABELS = (3, 8, 5)
PROMPTS = ("a cat", "two dogs", "snow")


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    model = bitdance_jax.load(tiny_models.save_model(tmp_path_factory.mktemp("labels") / "model"))
    model.sampler = SAMPLER
    return model


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts") / "toy"
    toy_text_to_image.save(folder, tiny_models.TEXT_TO_IMAGE)
    model = bitdance_jax.load(folder)
    model.sampler = SAMPLER
    model.default_size = (8, 8)
    return model


def codes(model, *inputs, **options):
    """Of two images."""
    return model.sample([*inputs], seed=1, output="codes", progress=False, **options)


@pytest.mark.parametrize("kind", ["labels", "prompts"])
def test_a_weighted_sum_of_conditions(request, kind):
    """A weight of 0 counts nothing, and conditions are padded to those of another image."""
    model = request.getfixturevalue(kind)
    first, second, third = LABELS if kind == "labels" else PROMPTS
    plain = codes(model, second, third)
    draw = functools.partial(codes, model)
    np.testing.assert_array_equal(draw(Weighted([first, second], [0.0, 1.0]), third), plain)
    both = draw(Weighted([first, second], [1.0, 0.5]), Weighted([third], [1.0]))
    assert (both[0] != plain[0]).any()
    np.testing.assert_array_equal(both[1], plain[1])
    swapped = draw(Weighted([second, first], [0.5, 1.0]), third)
    assert (swapped == both).mean() > 0.99  # up to rounding
    # The weights of images without guidance: half of each condition.
    unguided = dataclasses.replace(SAMPLER, guidance_scale=1.0)
    same = draw(Weighted([first, first], [0.5, 0.5]), second, sampler=unguided)
    expected = codes(model, first, second, sampler=unguided)
    assert (same == expected).mean() > 0.99
    text = model.metadata(Weighted([first, second], [1.0, -0.5]))[0]
    assert text[model.input_kind] == f"{first} (1), {second} (-0.5)"


def test_kept_patches_of_weighted_conditions(labels):
    given = codes(labels, 0, 1)[0]
    mixed = Weighted([3, 8], [1.0, 0.5])
    result = codes(labels, mixed, 5, given=Given(given, keep_patches=8))
    np.testing.assert_array_equal(result[:, :4], np.stack([given[:4]] * 2))
    assert (result[0, 4:] != given[4:]).any()


def test_negative_prompts(prompts):
    """At a guidance scale of 0 an image is that of its negative prompt."""
    zero = dataclasses.replace(SAMPLER, guidance_scale=0.0)
    one = dataclasses.replace(SAMPLER, guidance_scale=1.0)
    cat, dogs, snow = PROMPTS
    negative = codes(prompts, cat, dogs, sampler=zero, negative_prompt=[dogs, snow])
    np.testing.assert_array_equal(negative, codes(prompts, dogs, snow, sampler=one))
    plain = codes(prompts, cat, dogs)
    steered = codes(prompts, cat, dogs, negative_prompt=snow)
    assert (steered != plain).any((1, 2, 3)).all()
    np.testing.assert_array_equal(steered, codes(prompts, cat, dogs, negative_prompt=[snow, snow]))
    texts = prompts.metadata([cat, dogs], negative_prompt=[dogs, snow], images_per_input=2)
    assert [text["negative_prompt"] for text in texts] == [dogs, dogs, snow, snow]


def test_an_image_in_weighted_prompts(prompts):
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    shown = ImagePrompt("make it night", [image])
    mixed = Weighted([shown, "snow"], [1.0, 0.0])
    expected = codes(prompts, shown, shown)
    np.testing.assert_array_equal(codes(prompts, mixed, mixed), expected)


def test_guidance_of_some_patches(labels):
    """Before the first guided patch an image is that without guidance, and differs after it."""
    limited = dataclasses.replace(SAMPLER, guidance_patch_start=0.5)
    without = codes(labels, 3, 8, sampler=dataclasses.replace(SAMPLER, guidance_scale=1.0))
    half = codes(labels, 3, 8, sampler=limited)
    np.testing.assert_array_equal(half[:, :4], without[:, :4])
    assert (half[:, 4:] != without[:, 4:]).any((1, 2, 3)).all()
    assert labels.metadata(3, sampler=limited)[0]["guidance_patch_start"] == "0.5"


def test_bad_input(labels, prompts, as_users_call):
    one = dataclasses.replace(SAMPLER, guidance_scale=1.0)
    for model, inputs, options, message in [
        (labels, 3, {"negative_prompt": "snow"}, "a class-conditional model has no prompts"),
        (prompts, "cat", {"negative_prompt": "snow", "sampler": one}, "needs guidance"),
        (prompts, "cat", {"negative_prompt": ["a", "b"]}, "1 prompts, got 2"),
        (prompts, "cat", {"negative_prompt": " "}, "a prompt is empty"),
        (prompts, "cat", {"negative_prompt": 3}, "negative_prompt.0. must be str"),
        (labels, Weighted([], []), {}, "0 of them, got 0 weights"),
        (labels, Weighted([3, 4], [1.0]), {}, "2 of them, got 1 weights"),
        (labels, Weighted([3], [float("nan")]), {}, "a weight must be a finite number"),
        (labels, Weighted([99], [1.0]), {}, "label 99 is out of range"),
    ]:
        with pytest.raises(UserError, match=message):
            model.sample(inputs, progress=False, **options)
