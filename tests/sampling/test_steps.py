"""Class-conditional pictures while they are drawn."""

import dataclasses

import numpy as np
import pytest
import tiny_models

import bitdance_jax
from bitdance_jax import UserError
from bitdance_jax.sampling.steps import sample_steps


@pytest.mark.parametrize(("raster", "scale", "schedule"), [("token", 2.0, "linear"), ("patch", 1.0, "linear"), ("patch", 2.0, "constant")])
def test_the_last_pictures_are_those_of_sample(tmp_path, raster, scale, schedule):
    tiny_models.save_model(tmp_path / "model", dataclasses.replace(tiny_models.MODEL, order=raster))
    model = bitdance_jax.load(tmp_path / "model")
    sampler = dataclasses.replace(tiny_models.SAMPLER, guidance_scale=scale, guidance_schedule=schedule)
    parts = list(sample_steps(model, [0, 3, 8], seed=2, every=6, sampler=sampler, first_index=1))
    assert [part.drawn for part in parts] == [1, 7, 13, 16]
    np.testing.assert_array_equal(parts[-1].pictures, model.sample([0, 3, 8], seed=2, sampler=sampler, first_index=1, progress=False))


def test_what_is_not_drawn_is_grey(tmp_path):
    model = bitdance_jax.load(tiny_models.save_model(tmp_path / "model"))
    first, *_ = sample_steps(model, [0], every=4, sampler=tiny_models.SAMPLER)
    grey = (first.pictures[0] == 128).all(-1)
    assert grey[4:].all() and grey[:, 4:].all() and not grey[:4, :4].all()


def test_bad_input(tmp_path):
    model = bitdance_jax.load(tiny_models.save_model(tmp_path / "model"))
    for labels, every, message in [([0], 0, "every must be positive"), ([], 1, "no labels"), ([9], 1, "out of range")]:
        with pytest.raises(UserError, match=message):
            next(sample_steps(model, labels, every=every))
