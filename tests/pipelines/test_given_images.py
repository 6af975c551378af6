"""Images of which a part is given: kept patches bit for bit, the others as `sample` has them."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tiny_models
from processes import python

import bitdance_jax
from bitdance_jax import Given, SamplerConfig
from bitdance_jax.errors import UserError
from bitdance_jax.pipelines import toy_text_to_image


SAMPLER = SamplerConfig(head_steps=2, guidance_scale=2.0, guidance_schedule="constant")
SIDE = 16
ALL = np.ones((SIDE, SIDE), bool)
INPUTS = {"class_conditional": [3, 8], "text_to_image": ["a cat", "two dogs"]}


@functools.cache
def tiny(root, kind, tokens_per_step, mesh=None):
    """A model of tokens of 2 x 2 pixels, whose images have 16 x 16 pixels."""
    folder = root / f"{kind}_{tokens_per_step}"
    if not folder.exists():
        if kind == "class_conditional":
            config = dataclasses.replace(tiny_models.MODEL, tokens_per_step=tokens_per_step)
            tiny_models.save_model(folder, config)
        else:
            tokenizer = tiny_models.TEXT_TO_IMAGE.tokenizer
            head = tiny_models.TEXT_TO_IMAGE.head
            config = toy_text_to_image.config(tokens_per_step)
            config = dataclasses.replace(config, tokenizer=tokenizer, head=head)
            toy_text_to_image.save(folder, config)
    model = bitdance_jax.load(folder, mesh=mesh)
    model.sampler = SAMPLER
    model.default_size = (SIDE, SIDE)
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(root):
    """16 patches of 4 x 4 pixels."""
    return tiny(root, "class_conditional", 4)


def pixels_of(patches):
    """The pixels of patches in raster order, bool [16, 16]."""
    side = int(len(patches) ** 0.5)
    grid = np.asarray(patches).reshape(side, side)
    return grid.repeat(SIDE // side, 0).repeat(SIDE // side, 1)


def check(model):
    """Nothing kept; an image's own patches kept; another image's patches kept."""
    inputs = INPUTS[model.kind]
    draw = functools.partial(model.sample, inputs, output="codes", progress=False)
    codes = draw(seed=1)
    np.testing.assert_array_equal(draw(seed=1, given=Given(-codes[0], ALL)), codes)

    count = model.num_patches()
    masks = np.random.default_rng(0).integers(0, 2, (2, count)).astype(bool)
    masks[:, 0] = False, True
    masks[:, -1] = True, False
    given = [Given(image, pixels_of(mask)) for image, mask in zip(codes, masks, strict=True)]
    np.testing.assert_array_equal(draw(seed=1, given=given), codes)

    others = draw(seed=2, given=given)
    tokens = np.stack([pixels_of(mask)[::2, ::2] for mask in masks])
    np.testing.assert_array_equal(others[~tokens], codes[~tokens])
    assert (others[tokens] != codes[tokens]).any()


@pytest.mark.parametrize(
    ("kind", "tokens_per_step"),
    [
        ("class_conditional", 4),
        ("text_to_image", 4),
        *(
            pytest.param(kind, tokens, marks=pytest.mark.slow)
            for kind in INPUTS
            for tokens in (1, 16)
        ),
    ],
)
def test_kept_patches_and_samples(root, kind, tokens_per_step):
    check(tiny(root, kind, tokens_per_step))


def test_one_program_for_all_masks(model):
    image = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    programs = model._execution.programs.sampler.advance
    model.complete(image, ALL, [1, 2], progress=False)
    compiled = programs._cache_size()
    model.complete(image, pixels_of(np.arange(16) % 3 == 0), [4, 5], 7, progress=False)
    model.complete(image, None, [2, 2], keep_patches=5, progress=False)
    assert programs._cache_size() == compiled


def test_masked_pixels_are_not_read(model, tmp_path):
    """A patch of which one pixel is masked is sampled anew; files are as good as arrays."""
    image = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[5, 5:10] = True  # in patches 5 and 6
    (text,) = model.metadata(3, given=Given(image, mask))
    assert text["kept_patches"] == "0-4, 7-15"
    codes = model.complete(image, mask, [3, 4], output="codes", progress=False)
    PIL.Image.fromarray(np.where(mask[..., None], 0, image)).save(tmp_path / "image.png")
    PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
    files = tmp_path / "image.png", tmp_path / "mask.png"
    again = model.complete(*files, [3, 4], output="codes", progress=False)
    np.testing.assert_array_equal(again, codes)
    (text,) = model.metadata(3, given=Given(*files, paste=True))
    assert (text["completed"], text["mask"], text["pasted"]) == ("image.png", "mask.png", "True")


def test_an_image_on_a_larger_canvas(model, root):
    """Only patches that are entirely in the image are kept."""
    image = np.random.default_rng(1).integers(0, 256, (10, 8, 3), np.uint8)
    on_canvas = Given(image, at=(3, 4), paste=True)
    assert model.metadata(3, given=on_canvas)[0]["kept_patches"] == "5-6, 9-10"
    result = model.sample([3, 4], given=on_canvas, progress=False)
    np.testing.assert_array_equal(result[:, 4:12, 4:12], np.stack([image[1:9]] * 2))

    prompts = tiny(root, "text_to_image", 4)
    prompts.default_size = (4, 4)
    two = INPUTS["text_to_image"]
    large = prompts.complete(image, None, two, at=(0, 4), size="16x16", progress=False)
    assert large.shape == (2, SIDE, SIDE, 3)
    # Without `at` the canvas is the image.
    again = prompts.complete(large[0], None, two, keep_patches=1, progress=False)
    assert again.shape == large.shape
    prompts.default_size = (SIDE, SIDE)


def test_previews_and_batches(model):
    image = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    options = {"seed": 4, "given": Given(image, keep_patches=3, paste=True)}
    images = model.sample([1, 2, 5], **options, progress=False, batch_size=2)
    assert len({image.tobytes() for image in images}) == 3
    *_, last = parts = list(model.sample_steps([1, 2], every=6, **options))
    np.testing.assert_array_equal(last.images, images[:2])
    grey = (parts[0].images == 128).reshape(2, 4, 4, 4, 4, 3).all((0, 2, 4, 5)).ravel()
    np.testing.assert_array_equal(grey, np.arange(16) >= 3)  # the first is sampled, three kept
    batches = np.concatenate(list(model.batches([1, 2, 5], batch_size=2, **options)))
    np.testing.assert_array_equal(batches, images)
    np.testing.assert_array_equal(batches[:, :4, :12], np.stack([image[:4, :12]] * 3))


def test_bad_input(model, root, tmp_path, as_users_call):
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    small = image[:8]
    (tmp_path / "damaged.png").write_bytes(b"no image")
    prompts = tiny(root, "text_to_image", 4)
    for one, options, message in [
        (Given(image), {}, "all 16 patches are kept"),
        (Given(image, keep_patches=17), {}, "keep_patches must be between 0 and 16"),
        (Given(image, ALL[:8]), {}, "the mask is 16x8 and the image 16x16"),
        (Given(image, image[..., 0]), {}, "mask must be .* got uint8"),
        (Given(small), {}, "the image is 16x8 and the canvas 16x16"),
        (Given(small, at=(9, 0)), {}, "it does not fit at row 9, column 0"),
        (Given(small, at=(-1, 0)), {}, "at.0. must be between 0"),
        (Given(image / 255, ALL), {}, "image must be"),
        (Given(np.zeros((8, 8, 8), np.int8), ALL), {}, "codes must be -1 or 1"),
        (Given(np.ones((8, 8, 8), np.int8), ALL, paste=True), {}, "paste needs the pixels"),
        (Given(np.ones((4, 8, 8), np.int8), at=(1, 0)), {}, "multiples of 2 pixels"),
        (Given(tmp_path / "damaged.png", ALL), {}, "cannot read the image"),
        ([Given(image, ALL)] * 3, {}, "2 inputs, got 3 images"),
        ("image.png", {}, "given must be"),
    ]:
        with pytest.raises(UserError, match=message):
            model.sample([0, 1], given=one, progress=False, **options)
    with pytest.raises(UserError, match="multiples of 4"):
        prompts.complete(image[:9], ALL[:9], "a cat")


SCRIPT = """
import sys
from pathlib import Path

sys.path.insert(0, {tests!r})
from bitdance_jax import MeshConfig, Weighted
from test_given_images import check, tiny


def weighted(model):
    inputs = [Weighted([3, 8], [1.0, 0.5]), 5]
    return model.sample(inputs, output="codes", progress=False)


one = tiny(Path("."), "class_conditional", 4)
for mesh in (MeshConfig(data=2), MeshConfig(data=1, tensor=2)):
    model = tiny(Path("."), "class_conditional", 4, mesh)
    check(model)
    assert (weighted(model) == weighted(one)).mean() > 0.99
"""


@pytest.mark.slow(20)
def test_two_devices(tmp_path):
    """A data mesh, where each device has its own images, masks and weights, and sharded layers."""
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    python(["-c", script], tmp_path, devices=2)
