"""Compares images that two programs compute."""

import numpy as np


def assert_same_images(actual, desired):
    """Allows a difference of one level: programs of different batch sizes round differently."""
    assert actual.dtype == desired.dtype == np.uint8
    assert actual.shape == desired.shape
    assert np.abs(actual.astype(int) - desired).max() <= 1
