"""Class-conditional images while they are sampled."""

import dataclasses

import numpy as np
import pytest
import tiny_models

import bitdance_jax
from bitdance_jax import UserError


@pytest.mark.parametrize(
    ("raster", "scale", "schedule"),
    [
        ("token", 2.0, "linear"),
        pytest.param("patch", 1.0, "linear", marks=pytest.mark.slow),
        pytest.param("patch", 2.0, "constant", marks=pytest.mark.slow),
    ],
)
def test_steps_end_in_the_images(tmp_path, raster, scale, schedule):
    """Patches that are not sampled yet are grey, and the last images are those of `sample`.

    There are 4 x 4 patches of 4 tokens, which have 2 x 2 pixels each.
    """
    tiny_models.save_model(tmp_path / "model", dataclasses.replace(tiny_models.MODEL, order=raster))
    model = bitdance_jax.load(tmp_path / "model")
    sampler = dataclasses.replace(
        tiny_models.SAMPLER, guidance_scale=scale, guidance_schedule=schedule
    )
    parts = list(model.sample_steps([0, 3, 8], seed=2, every=6, sampler=sampler, first_index=1))
    assert [part.sampled for part in parts] == [1, 7, 13, 16]
    assert {part.patches for part in parts} == {16}
    np.testing.assert_array_equal(
        parts[-1].images,
        model.sample([0, 3, 8], seed=2, sampler=sampler, first_index=1, progress=False),
    )
    patches = (
        np.arange(16).reshape(4, 4).repeat(2, 0).repeat(2, 1)
        if raster == "patch"
        else np.arange(64).reshape(8, 8) // 4
    )
    for part in parts:
        grey = (part.images == 128).reshape(3, 8, 2, 8, 2, 3).all((0, 2, 4, 5))
        np.testing.assert_array_equal(grey, patches >= part.sampled)


def test_bad_input(tmp_path):
    model = bitdance_jax.load(tiny_models.save_model(tmp_path / "model"))
    for labels, every, message in [
        ([0], 0, "every"),
        ([], 1, "inputs"),
        ([9], 1, "out of range"),
    ]:
        with pytest.raises(UserError, match=message):
            next(model.sample_steps(labels, every=every))
