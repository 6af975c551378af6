"""TensorFlow 1's bilinear resizing, against its definition pixel by pixel."""

import math

import numpy as np
import pytest

from bitdance_jax.fid.resize import resize_bilinear


def by_definition(image, height, width):
    result = np.zeros((height, width, image.shape[2]))
    for i in range(height):
        for j in range(width):
            y, x = i * image.shape[0] / height, j * image.shape[1] / width
            top, left = math.floor(y), math.floor(x)
            bottom, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
            upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
            lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
            result[i, j] = upper * (1 - (y - top)) + lower * (y - top)
    return result


@pytest.mark.parametrize(
    ("before", "after"),
    [((5, 7), (13, 12)), ((9, 4), (4, 9)), ((16, 16), (7, 5)), ((1, 3), (4, 4))],
)
def test_definition(before, after):
    images = np.random.default_rng(0).integers(0, 256, (2, *before, 3)).astype(np.uint8)
    expected = [by_definition(image.astype(float), *after) for image in images]
    np.testing.assert_allclose(resize_bilinear(images, after), expected, atol=1e-3)


def test_corners_not_centres_coincide_and_the_end_repeats():
    row = np.array([0, 100], np.uint8).reshape(1, 1, 2, 1)
    np.testing.assert_array_equal(np.ravel(resize_bilinear(row, (1, 4))), [0, 50, 100, 100])


def test_shrinking_picks_pixels_without_smoothing():
    row = np.arange(8, dtype=np.uint8).reshape(1, 1, 8, 1)
    np.testing.assert_array_equal(np.ravel(resize_bilinear(row, (1, 4))), [0, 2, 4, 6])


def test_the_same_size_changes_nothing():
    images = np.random.default_rng(0).integers(0, 256, (2, 11, 9, 3)).astype(np.uint8)
    np.testing.assert_array_equal(resize_bilinear(images, (11, 9)), images)
