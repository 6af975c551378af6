import functools
import itertools

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import assert_close

from bitdance_jax.config import SamplerConfig
from bitdance_jax.flow_head import solver
from bitdance_jax.flow_head.objective import remaining_time


@pytest.fixture(scope="module")
def pieces() -> dict[str, np.ndarray]:
    return golden_models.read("pieces/pieces")


def one_step(t: float, keep: float, move: float, diffuse: float) -> solver.Steps:
    return solver.Steps(*(jnp.array([value], jnp.float32) for value in (t, keep, move, diffuse)))


def solve_with_velocity(pieces: dict[str, np.ndarray], steps: solver.Steps) -> jax.Array:
    """From the recorded sample, with the recorded noise, where the head's velocity is the recorded one."""
    noise = jnp.stack([pieces["em_step.x"], pieces["em_step.noise"]])
    velocity = jnp.asarray(pieces["em_step.v"])
    return solver.solve(
        lambda x, time: x + remaining_time(steps.t[0]) * velocity, noise, steps, jnp.zeros((1, 1)), float(pieces["em_step.cfg"])
    )


def test_euler_maruyama_step(pieces):
    t, dt = pieces["em_step.t"], pieces["em_step.dt"]
    steps = one_step(t, keep=1 - dt, move=(1 + t) * dt, diffuse=np.sqrt(2 * (1 - t) * dt))
    assert_close(solve_with_velocity(pieces, steps), pieces["em_step.out"], 1e-5)


def test_last_euler_step(pieces):
    """The recorded step is the released sampler's last one, of 0.05 at t = 0.95."""
    steps = solver.solver_steps(SamplerConfig(head_steps=7))
    last = solver.Steps(*(coefficients[-1:] for coefficients in steps))
    np.testing.assert_allclose([float(value[0]) for value in last], [0.95, 1.0, 0.05, 0.0], rtol=1e-6)
    assert_close(solve_with_velocity(pieces, last), pieces["euler_step.out"], 1e-5)


def reference(predict, noise: np.ndarray, config: SamplerConfig, shift: float, scale: float | None) -> np.ndarray:
    """SPEC 3 step by step, in float64."""

    def velocity(x, t):
        left = max(1 - t, 0.05)
        if scale is None:
            return (predict(x, t) - x) / left
        conditional, unconditional = np.split((predict(np.concatenate([x, x]), t) - np.concatenate([x, x])) / left, 2)
        return unconditional + scale * (conditional - unconditional)

    end = 1.0 if config.solver == "euler" else 0.95
    times = [t and (1 / shift) / (1 / shift + 1 / t - 1) for t in np.linspace(0, end, config.head_steps + 1)]
    x, fresh = noise[0].astype(np.float64), iter(noise[1:])
    for t, following in itertools.pairwise(times):
        dt = following - t
        if config.solver == "euler":
            x = x + velocity(x, t) * dt
        else:
            x = x + ((1 + t) * velocity(x, t) - x) * dt + np.sqrt(2 * (1 - t) * dt) * next(fresh)
    if config.solver == "euler_maruyama":
        x = x + velocity(x, 0.95) * 0.05
    assert next(fresh, None) is None
    return x


def toy_predict(x, t, xp):
    """Mixes tokens and bits, and treats rows differently, as conditional and unconditional ones."""
    rows = xp.arange(x.shape[0])[:, None, None]
    return xp.tanh(1.5 * x[:, ::-1] + x[..., ::-1] * xp.cos(3 * t) + 0.3 * rows - t)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("scale", [None, 1.0, 2.5])
@pytest.mark.parametrize("kind", ["euler_maruyama", "euler"])
def test_against_a_slow_reference(kind, scale, shift):
    config = SamplerConfig(head_steps=6, solver=kind)
    noise = jax.random.normal(jax.random.key(0), (solver.num_noises(config), 3, 4, 8))
    steps = solver.solver_steps(config, shift)
    # The embedding of a time is here the time itself.
    x = solver.solve(lambda x, time: toy_predict(x, time[0], jnp), noise, steps, steps.t[:, None], scale)
    assert_close(x, reference(functools.partial(toy_predict, xp=np), np.asarray(noise), config, shift, scale), 1e-5)


@pytest.mark.parametrize("kind", ["euler_maruyama", "euler"])
def test_the_result_is_the_last_prediction(kind):
    config = SamplerConfig(head_steps=10, solver=kind)
    steps = solver.solver_steps(config)
    assert len(steps.t) == (11 if kind == "euler_maruyama" else 10)
    noise = jax.random.normal(jax.random.key(0), (solver.num_noises(config), 2, 4, 8))
    # It predicts the number of the evaluation, counted from 0.
    x = solver.solve(lambda x, time: jnp.full_like(x, time[0]), noise, steps, jnp.arange(len(steps.t), dtype=jnp.float32)[:, None], None)
    np.testing.assert_allclose(x, len(steps.t) - 1, atol=1e-4)


def test_scale_one_is_the_conditional_prediction():
    velocity = jax.random.normal(jax.random.key(0), (6, 4, 8))
    np.testing.assert_allclose(solver.guide(velocity, 1.0), velocity[:3], atol=1e-6)
    np.testing.assert_allclose(solver.guide(velocity, 0.0), velocity[3:], atol=1e-6)
    np.testing.assert_allclose(solver.guide(velocity, 3.0), 3 * velocity[:3] - 2 * velocity[3:], atol=1e-5)


def test_guidance_schedules():
    linear = SamplerConfig(guidance_scale=3.0, guidance_schedule="linear")
    constant = SamplerConfig(guidance_scale=3.0, guidance_schedule="constant")
    np.testing.assert_allclose(solver.guidance_scales(linear, 4), [1.0, 1.5, 2.0, 2.5])
    np.testing.assert_allclose(solver.guidance_scales(constant, 4), [3.0] * 4)
