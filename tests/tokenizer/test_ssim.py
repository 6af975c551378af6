"""SSIM: a recorded value of scikit-image, the definition by windows, and simple cases."""

import json

import numpy as np
import pytest
from golden_models import GOLDEN, read

from bitdance_jax.errors import UserError
from bitdance_jax.evaluate.psnr import psnr
from bitdance_jax.tokenizer.ssim import ssim


def by_definition(x, y):
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            for c in range(x.shape[2]):
                a, b = (image[i : i + 11, j : j + 11, c].astype(float) for image in (x, y))
                ma, mb = np.sum(window * a), np.sum(window * b)
                va, vb, vab = (
                    np.sum(window * p * q) - mp * mq
                    for p, q, mp, mq in ((a, a, ma, ma), (b, b, mb, mb), (a, b, ma, mb))
                )
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                values.append(
                    (2 * ma * mb + c1) * (2 * vab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
                )
    return np.mean(values)


def test_recorded():
    images = read("evaluation/psnr_ssim")
    expected = json.loads((GOLDEN / "evaluation" / "psnr_ssim.json").read_text())
    x, y = images["x"][None], images["y"][None]
    np.testing.assert_allclose(psnr(x, y), expected["psnr"], rtol=1e-12)
    np.testing.assert_allclose(ssim(x, y), expected["ssim_gaussian_sigma1.5"], atol=1e-6)
    np.testing.assert_allclose(ssim(y, x), ssim(x, y), atol=1e-6)


def test_definition_of_each_image():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (2, 14, 16, 3)).astype(np.uint8)
    y = np.clip(x + rng.integers(-60, 60, x.shape), 0, 255).astype(np.uint8)
    np.testing.assert_allclose(
        ssim(x, y), [by_definition(a, b) for a, b in zip(x, y, strict=True)], atol=1e-5
    )


def test_equal_images_and_flat_ones():
    noise = np.random.default_rng(0).integers(0, 256, (1, 20, 20, 3)).astype(np.uint8)
    np.testing.assert_allclose(ssim(noise, noise), 1, atol=1e-6)
    black, white = np.zeros_like(noise), np.full_like(noise, 255)
    np.testing.assert_allclose(ssim(black, white), 1e-4 / (1 + 1e-4), atol=1e-6)


def test_too_small():
    with pytest.raises(UserError, match="at least 11 pixels a side, got 10 x 64"):
        ssim(*np.zeros((2, 1, 10, 64, 3), np.uint8))
