import collections

import numpy as np
import pytest
from PIL import Image

from bitdance_jax.config import AugmentConfig
from bitdance_jax.data import transforms


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("shape", "new_shape"),
    [((64, 64), (64, 64)), ((40, 90), (64, 144)), ((300, 257), (75, 64)), ((129, 400), (64, 200))],
)
def test_scale_shorter_side(shape, new_shape):
    assert transforms.scale_shorter_side(random_image(*shape), 64).shape == (*new_shape, 3)


def test_large_images_are_halved_by_averaging():
    image = random_image(48, 96)
    halved = image.reshape(24, 2, 48, 2, 3).mean(axis=(1, 3))
    quartered = halved.reshape(12, 2, 24, 2, 3).mean(axis=(1, 3))
    scaled = transforms.scale_shorter_side(image, 12)
    assert scaled.shape == quartered.shape
    assert (
        np.abs(scaled - quartered).max() <= 2
    )  # Pillow rounds four times: rows and columns, twice


def test_centre_crop_is_the_middle():
    image = random_image(20, 33)
    np.testing.assert_array_equal(transforms.centre_crop(image, 20), image[:, 6:26])
    np.testing.assert_array_equal(
        transforms.centre_crop(image.swapaxes(0, 1), 20), image[:, 6:26].swapaxes(0, 1)
    )


def test_nothing_to_crop_is_the_identity():
    image, config = random_image(64, 64), AugmentConfig(min_crop=1.0, flip=0.0)
    np.testing.assert_array_equal(transforms.centre_crop(image, 64), image)
    np.testing.assert_array_equal(
        transforms.augment(image, 64, config, rng=np.random.default_rng(0)), image
    )


def test_small_images_grow():
    assert transforms.centre_crop(random_image(10, 17), 64).shape == (64, 64, 3)
    assert transforms.random_crop(
        random_image(10, 17), 64, min_crop=0.8, rng=np.random.default_rng(0)
    ).shape == (
        64,
        64,
        3,
    )


def test_centre_crops_are_flipped_too():
    """Images are still flipped when crops are no longer random (paper section 4.2)."""
    image, config, rng = (
        random_image(20, 33),
        AugmentConfig(min_crop=0.5, flip=0.5),
        np.random.default_rng(0),
    )
    centre = transforms.centre_crop(image, 8)
    shown = {transforms.augment(image, 8, config, rng=rng, crop=False).tobytes() for _ in range(20)}
    assert shown == {centre.tobytes(), centre[:, ::-1].tobytes()}


@pytest.mark.parametrize("turned", [False, True])
def test_a_long_strip_is_cropped_before_it_is_scaled(monkeypatch, turned):
    strip = np.zeros((1, 65_000, 3), np.uint8)
    strip[:, :, 0] = np.arange(65_000) // 256
    image = strip.swapaxes(0, 1) if turned else strip
    largest = 0
    resize = Image.Image.resize

    def watched(self, size, *arguments):
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return resize(self, size, *arguments)

    monkeypatch.setattr(Image.Image, "resize", watched)
    assert np.unique(transforms.centre_crop(image, 256)).tolist() == [0, 126]
    values = {
        transforms.random_crop(image, 256, min_crop=0.8, rng=np.random.default_rng(seed)).max()
        for seed in range(5)
    }
    assert len(values) == 5 and largest == 256 * 256


def test_only_the_cropped_part_of_a_long_image_is_scaled(monkeypatch):
    rng = np.random.default_rng(0)
    image = np.asarray(
        Image.fromarray(rng.integers(0, 256, (5, 90, 3), dtype=np.uint8)).resize((900, 50))
    )
    crops = []
    for longest in (transforms.LONGEST, 99):
        monkeypatch.setattr(transforms, "LONGEST", longest)
        crops.append(
            transforms.random_crop(image, 24, min_crop=0.8, rng=np.random.default_rng(1)).astype(
                int
            )
        )
    assert np.abs(crops[0] - crops[1]).max() <= 1


def test_random_crops_are_all_the_possible_ones():
    """Every crop is one that ADM's rule allows, and every allowed one comes up, about as often as
    it should."""
    image, size, samples = random_image(16, 18), 8, 3000
    allowed = collections.defaultdict(float)
    for shorter in (8, 9, 10):  # ceil(8 / 1) ... ceil(8 / 0.8)
        scaled = transforms.scale_shorter_side(image, shorter)
        tops, lefts = (length - size + 1 for length in scaled.shape[:2])
        for top in range(tops):
            for left in range(lefts):
                allowed[scaled[top : top + size, left : left + size].tobytes()] += samples / (
                    3 * tops * lefts
                )

    rng = np.random.default_rng(0)
    seen = collections.Counter(
        transforms.random_crop(image, size, min_crop=0.8, rng=rng).tobytes() for _ in range(samples)
    )
    assert set(seen) == set(allowed)
    for crop, expected in allowed.items():
        assert abs(seen[crop] - expected) < 5 * expected**0.5


def test_shorter_side_is_resized_as_pillow_does():
    image = random_image(16, 18)
    expected = np.asarray(Image.fromarray(image).resize((10, 9), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(transforms.scale_shorter_side(image, 9), expected)


@pytest.mark.parametrize("crop", [True, False])
def test_flips_mirror_left_and_right(crop):
    image, rng = random_image(8, 8), np.random.default_rng(0)
    config = AugmentConfig(min_crop=1.0, flip=0.25)
    flips = 0
    for _ in range(1000):
        result = transforms.augment(image, 8, config, rng=rng, crop=crop)
        flipped = np.array_equal(result, image[:, ::-1])
        assert flipped or np.array_equal(result, image)
        flips += flipped
    assert 200 < flips < 300


def test_cropped_share_fades_linearly():
    assert transforms.cropped_share(AugmentConfig(), 10**6) == 1
    fading = AugmentConfig(decay_start=700, decay_end=750)
    assert [transforms.cropped_share(fading, epoch) for epoch in (0, 700, 725, 740, 750, 799)] == [
        1,
        1,
        0.5,
        0.2,
        0,
        0,
    ]
    at_once = AugmentConfig(decay_start=5, decay_end=5)
    assert [transforms.cropped_share(at_once, epoch) for epoch in (4, 5)] == [1, 0]
