import numpy as np
import pytest

from bitdance_jax.evaluate.psnr import psnr


def test_known_values():
    """Errors of 1 everywhere, of 2 in half of the pixels, and of 255 everywhere."""
    reference = np.full((3, 4, 6, 3), 100, np.uint8)
    images = reference.copy()
    images[0] += 1
    images[1, :2] -= 2
    reference[2], images[2] = 0, 255
    expected = [20 * np.log10(255), 20 * np.log10(255) - 10 * np.log10(2), 0]
    np.testing.assert_allclose(psnr(images, reference), expected, atol=1e-12)


def test_it_is_symmetric_and_does_not_wrap_around():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 5, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(psnr(a, b), psnr(b, a))
    expected = [
        10 * np.log10(255**2 / np.mean((x.astype(float) - y.astype(float)) ** 2))
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(psnr(a, b), expected)


@pytest.mark.filterwarnings("error")
def test_equal_images_are_infinitely_close():
    image = np.zeros((2, 4, 4, 3), np.uint8)
    np.testing.assert_array_equal(psnr(image, image), [np.inf, np.inf])
