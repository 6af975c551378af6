"""examples/solver.py: its order, and the names by which it is found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from example_files import load_example

from bitdance_jax import ClassConditionalPipeline, Tokenizer
from bitdance_jax.config import ConfigError, SamplerConfig, from_dict, to_dict
from bitdance_jax.config.sampler import SOLVERS
from bitdance_jax.heads.flow_matching import remaining_time
from bitdance_jax.sampling.solvers import make_solver


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    example = load_example("solver")
    monkeypatch.setitem(SOLVERS, "adams_bashforth", SOLVERS.pop("adams_bashforth"))
    return example


def sampler(steps: int) -> SamplerConfig:
    return SamplerConfig(solver="adams_bashforth", head_steps=steps, guidance_scale=2.0)


def test_order_of_convergence():
    """Twice the steps make the error of dx/dt = x cos t a quarter."""

    def error(steps: int) -> float:
        solver = make_solver(sampler(steps), time_shift=1.0)
        times = solver.times()
        x = solver.solve(lambda x, i: x * jnp.cos(times[i]), jnp.ones((1, 1, 1, 1)))
        return abs(float(x[0, 0, 0]) - np.exp(np.sin(1.0)))

    assert np.log2(error(32) / error(64)) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_result_is_the_last_prediction(shift):
    solver = make_solver(sampler(10), shift)
    times = solver.times()
    noise = jax.random.normal(jax.random.key(0), (solver.num_noises, 2, 4, 8))
    # It predicts the number of the evaluation, counted from 0.
    x = solver.solve(lambda x, i: (i - x) / remaining_time(times[i]), noise)
    np.testing.assert_allclose(x, solver.num_evaluations - 1, atol=1e-4)


def test_a_model_samples_with_it():
    params = tiny_models.tokenizer_params()
    tokenizer = Tokenizer(tiny_models.TOKENIZER, params)
    model = ClassConditionalPipeline(tiny_models.MODEL, tiny_models.model_params(), tokenizer)
    codes = model.sample([0, 1], sampler=sampler(3), output="codes", progress=False)
    assert set(np.unique(codes)) == {-1, 1}


def test_names():
    assert from_dict(SamplerConfig, to_dict(sampler(3))) == sampler(3)
    with pytest.raises(ConfigError, match="solver"):
        SamplerConfig(solver="adams")
