"""The judge of solvers: its steps are the package's, and its noises those of the fine steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from benchmark_files import benchmark

from bitdance_jax.config import SamplerConfig
from bitdance_jax.heads.flow_matching import remaining_time
from bitdance_jax.models.class_conditional import ClassConditional
from bitdance_jax.nn.stack import unstack
from bitdance_jax.pipelines.programs import read_labels
from bitdance_jax.sampling.compiled import Inputs
from bitdance_jax.sampling.next_patch import resolve
from bitdance_jax.sampling.solvers import make_solver


@pytest.fixture(scope="module")
def judge():
    with benchmark("sampler_quality") as module:
        yield module


@pytest.mark.parametrize("kind", ["euler_maruyama", "euler", "multistep_sde", "multistep_ode"])
def test_steps_as_data(judge, kind):
    """The solver's result, whatever the number of unused evaluations."""
    solver = make_solver(SamplerConfig(solver=kind, head_steps=6), time_shift=1.0)
    padded = judge.tabulated(solver, capacity=10)
    noise = jax.random.normal(jax.random.key(0), (padded.num_noises, 2, 4, 8))
    times = jnp.pad(solver.times(), (0, 4))

    def velocity(x, i):
        return (jnp.tanh(1.5 * x[:, ::-1] + times[i]) - x) / remaining_time(times[i])

    expected = solver.solve(velocity, noise[: solver.num_noises])
    np.testing.assert_allclose(padded.solve(velocity, noise), expected, atol=1e-5)


def test_mixing(judge):
    """Of steps that start at fine ones, between them, or both."""
    fine = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.95])
    same, other = np.split(judge.mixing(fine, fine), 2, axis=1)
    np.testing.assert_allclose(same, np.eye(6), atol=1e-6)
    np.testing.assert_allclose(other, 0, atol=1e-6)
    mixed = judge.mixing(np.array([0.0, 0.2, 0.375]), fine)
    # They are independent, and have variance 1.
    np.testing.assert_allclose(mixed @ mixed.T, np.eye(3), atol=1e-6)
    same, other = np.split(mixed, 2, axis=1)
    np.testing.assert_allclose(same[0], [0.5**0.5, 0.5**0.5, 0, 0, 0, 0], atol=1e-6)
    # What two steps have of one fine step's noise adds up to it.
    lengths = np.sqrt([0.2, 0.175, 0.625])
    np.testing.assert_allclose(lengths @ same[:, :4], np.sqrt([0.1] * 4), atol=1e-6)
    np.testing.assert_allclose(lengths @ other, 0, atol=1e-6)


def test_stopping(judge):
    """After the first evaluations of which the last ones have changed no bit."""
    values = np.array([[1, 1], [-1, 1], [-1, 1], [1, 1], [1, 1], [1, 1]], np.int8)
    signs = np.stack([values, np.ones_like(values)], axis=1)[:, None, :, None]
    assert judge.last_evaluation(signs, 1).tolist() == [[2, 1]]
    assert judge.last_evaluation(signs, 2).tolist() == [[5, 2]]
    assert judge.last_evaluation(signs[:5], 2).tolist() == [[4, 2]]
    solver = make_solver(SamplerConfig(solver="multistep_sde", head_steps=6), time_shift=1.0)
    stopped = judge.stopped_after(judge.tabulated(solver, capacity=8), 3)
    noise = jnp.ones((stopped.num_noises, 1, 1, 1))
    remaining = remaining_time(jnp.pad(solver.times(), (0, 2)))
    # The prediction is the number of the evaluation, counted from 0.
    x = stopped.solve(lambda x, i: (i - x) / remaining[i], noise)
    np.testing.assert_allclose(x, 2, atol=1e-6)


def test_redrawn_patches_are_those_drawn(judge):
    """From the same noise, after the same preceding patches; from another noise they are others."""
    config = tiny_models.MODEL
    params = unstack(tiny_models.model_params())
    read = functools.partial(read_labels, ClassConditional(config))
    sampler = SamplerConfig(
        solver="multistep_sde", head_steps=2, guidance_scale=2.0, guidance_schedule="constant"
    )
    solver, scales = resolve(sampler, config.head.time_shift, config.num_steps)
    table = judge.tabulated(solver, capacity=2)
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 3))
    inputs = Inputs(jnp.array([0, 1, 2]))
    draw = jax.jit(functools.partial(judge.draw, read))
    values = draw(params, inputs, keys, scales, table)
    redraw = jax.jit(functools.partial(judge.redraw, read))
    again = redraw(params, inputs, keys, scales, table, values)
    np.testing.assert_allclose(again, values, atol=1e-4)
    others = redraw(params, inputs, keys + 1, scales, table, values)
    assert np.abs(others - values).max() > 0.1
