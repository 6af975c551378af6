"""Classifier-free guidance: scales of patches and evaluations, and the guided velocity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitdance_jax.config import ConfigError, SamplerConfig
from bitdance_jax.sampling import guidance
from bitdance_jax.sampling.solvers import Euler


LINEAR = SamplerConfig(head_steps=5, solver="euler", guidance_scale=3.0, guidance_schedule="linear")
CONSTANT = dataclasses.replace(LINEAR, guidance_schedule="constant")


def scales(config: SamplerConfig) -> np.ndarray | None:
    """Of 4 patches, at times 0, 0.2, ... 0.8."""
    return guidance.guidance_scales(config, Euler(5), 4)


def test_schedules():
    linear, constant = scales(LINEAR), scales(CONSTANT)
    assert linear.dtype == constant.dtype == np.float32
    np.testing.assert_array_equal(linear, np.float32([[1.0] * 5, [1.5] * 5, [2.0] * 5, [2.5] * 5]))
    np.testing.assert_array_equal(constant, np.full((4, 5), np.float32(3.0)))


def test_a_limited_interval():
    inside = np.array([False, True, True, False, False])
    for config in (LINEAR, CONSTANT):
        limited = dataclasses.replace(config, guidance_start=0.1, guidance_end=0.5)
        np.testing.assert_array_equal(scales(limited), np.where(inside, scales(config), 1))


def test_limited_patches():
    """Of 4 patches, at 0, 1/3, 2/3 and 1."""
    inside = np.array([False, True, True, False])[:, None]
    for config in (LINEAR, CONSTANT):
        limited = dataclasses.replace(config, guidance_patch_start=0.3, guidance_patch_end=0.9)
        np.testing.assert_array_equal(scales(limited), np.where(inside, scales(config), 1))


def test_a_scale_of_one_has_no_unconditional_rows():
    none = dataclasses.replace(CONSTANT, guidance_scale=1.0)
    assert scales(none) is None and guidance.rows_of_image(none) == 1
    assert guidance.rows_of_image(CONSTANT) == guidance.rows_of_image(LINEAR) == 2


def test_guide():
    velocity = jax.random.normal(jax.random.key(0), (6, 4, 8))
    for scale, expected in (
        (1.0, velocity[:3]),
        (0.0, velocity[3:]),
        (3.0, 3 * velocity[:3] - 2 * velocity[3:]),
    ):
        guided = guidance.guide(velocity, scale, separate=False)
        np.testing.assert_allclose(guided, np.tile(expected, (2, 1, 1)), atol=1e-5)
    np.testing.assert_array_equal(guidance.guide(velocity, 3.0, separate=True), velocity)


def test_a_weighted_sum():
    """One condition of weight 1 is plain guidance; of several the guided differences add up."""
    first, second, unconditional = jax.random.normal(jax.random.key(0), (3, 2, 4, 8))
    rows = jnp.concatenate([first, unconditional])
    one = guidance.guide_weighted(rows, 3.0, jnp.ones((2, 1)))
    np.testing.assert_allclose(one, guidance.guide(rows, 3.0, separate=False), atol=1e-5)
    weights = jnp.array([[1.0, 0.5], [-1.0, 0.0]])
    rows = jnp.concatenate([first, second, unconditional])
    guided = guidance.guide_weighted(rows, 3.0, weights)
    a, b = (weights[:, i, None, None] for i in range(2))
    expected = unconditional + 3 * (a * (first - unconditional) + b * (second - unconditional))
    np.testing.assert_allclose(guided, np.tile(expected, (3, 1, 1)), atol=1e-5)


@pytest.mark.parametrize(("start", "end"), [(0.6, 0.5), (-0.1, 0.5), (0.0, 1.5)])
def test_an_interval_that_cannot_be(start, end):
    with pytest.raises(ConfigError, match="guidance_"):
        SamplerConfig(guidance_start=start, guidance_end=end)
    with pytest.raises(ConfigError, match="guidance_patch_"):
        SamplerConfig(guidance_patch_start=start, guidance_patch_end=end)
