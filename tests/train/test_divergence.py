"""When a run is stopped for its losses."""

import numpy as np
import pytest

from bitdance_jax.train.divergence import MIN_LOSSES, WINDOW, DivergenceCheck


def problems(losses, spike=5.0):
    check = DivergenceCheck(spike)
    return {
        step: text
        for step, loss in enumerate(losses, start=1)
        if (text := check.problem({"loss": float(loss), "grad_norm": 1.0}))
    }


def usual(count, centre=1.0, scatter=0.1):
    return centre + scatter * np.random.default_rng(0).normal(size=count)


def test_a_value_that_is_not_finite_is_named():
    check = DivergenceCheck(None)
    nan = float("nan")
    assert check.problem({"loss": nan, "grad_norm": 1.0}) == "loss is nan"
    assert check.problem({"loss": 1.0, "grad_norm": float("inf")}) == "grad_norm is inf"
    assert check.problem({"loss": 1e9, "grad_norm": 1e9}) is None


def test_which_loss_is_not_finite():
    """A tokenizer's, with the part that made it so, or its discriminator's."""
    check = DivergenceCheck(5.0)
    nan = float("nan")
    usual = {"loss": 1.0, "l1": 0.1, "perceptual": 0.2, "discriminator_loss": 1.0, "grad_norm": 1.0}
    generator = usual | {"loss": nan, "perceptual": nan, "grad_norm": nan}
    assert check.problem(generator) == "loss is nan (as are perceptual)"
    discriminator = usual | {"discriminator_loss": nan, "logits_real": nan}
    assert check.problem(discriminator) == "discriminator_loss is nan (as are logits_real)"
    assert check.problem(usual) is None


def test_a_loss_of_several_times_the_median_is_a_spike():
    assert problems([*usual(150), 4.5]) == {}
    assert list(problems([*usual(150), 5.5])) == [151]
    assert problems([*usual(150), 5.5], spike=6.0) == problems([*usual(150), 1e6], spike=None) == {}
    assert (
        problems([*np.ones(150), 7.25])[151]
        == "loss is 7.25, far above the usual 1 (run.spike is 5),"
    )


def test_a_run_that_learns_is_no_spike():
    assert problems(10 * np.exp(-np.arange(500) / 50) + usual(500, 0.1, 0.02)) == {}


def test_losses_around_zero_are_measured_by_their_scatter():
    assert problems(usual(2000, centre=0.0)) == {}
    assert problems(usual(2000, centre=-0.05)) == {}
    assert list(problems([*usual(150, centre=0.0), 3.0])) == [151]


def test_only_enough_and_recent_losses_are_compared_with():
    assert problems([*np.ones(MIN_LOSSES - 1), 100.0]) == {}
    assert list(problems([*np.ones(MIN_LOSSES), 100.0])) == [MIN_LOSSES + 1]
    assert list(problems([*(100 * np.ones(1000)), *(np.ones(WINDOW)), 100.0])) == [
        1000 + WINDOW + 1
    ]


def test_a_spike_is_not_compared_with():
    check = DivergenceCheck(5.0)
    for _ in range(WINDOW):
        check.problem({"loss": 1.0, "grad_norm": 1.0})
    assert all(check.problem({"loss": 10.0, "grad_norm": 1.0}) for _ in range(WINDOW))


@pytest.mark.parametrize("loss", [0.0, -1.0, 1e-30])
def test_a_constant_loss_passes(loss):
    assert problems([loss] * 200) == {}
