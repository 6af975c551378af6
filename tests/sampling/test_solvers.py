import functools
import itertools

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import assert_close

from bitdance_jax.config import SamplerConfig
from bitdance_jax.heads.flow_matching import remaining_time
from bitdance_jax.sampling import guidance, solvers


@pytest.fixture(scope="module")
def pieces() -> dict[str, np.ndarray]:
    return golden_models.read("pieces/pieces")


def one_step(t: float, keep: float, move: float, diffuse: float) -> solvers.Steps:
    return solvers.Steps(*(jnp.array([value], jnp.float32) for value in (t, keep, move, diffuse)))


def recur(pieces: dict[str, np.ndarray], steps: solvers.Steps) -> jax.Array:
    """From the recorded sample, with the recorded noise and velocity."""
    noise = np.stack([pieces["em_step.x"], pieces["em_step.noise"]])
    velocity, scale = jnp.asarray(pieces["em_step.v"]), float(pieces["em_step.cfg"])
    rows = len(velocity) // noise.shape[1]
    noise = jnp.asarray(np.tile(noise, (1, rows, *[1] * (noise.ndim - 2))))
    guided = guidance.guide(velocity, scale, separate=False)
    return solvers.recur(steps, lambda x, i: guided, noise)[: len(pieces["em_step.x"])]


def test_euler_maruyama_step(pieces):
    t, dt = pieces["em_step.t"], pieces["em_step.dt"]
    steps = one_step(t, keep=1 - dt, move=(1 + t) * dt, diffuse=np.sqrt(2 * (1 - t) * dt))
    assert_close(recur(pieces, steps), pieces["em_step.out"], 1e-5)


def test_last_euler_step(pieces):
    """The recorded step is the released sampler's last one, of 0.05 at t = 0.95."""
    steps = solvers.EulerMaruyama(7).steps()
    last = solvers.Steps(*(coefficients[-1:] for coefficients in steps))
    np.testing.assert_allclose(
        [float(value[0]) for value in last], [0.95, 1.0, 0.05, 0.0], rtol=1e-6
    )
    assert_close(recur(pieces, last), pieces["euler_step.out"], 1e-5)


def reference(
    predict, noise: np.ndarray, config: SamplerConfig, shift: float, scale: float
) -> np.ndarray:
    """The paper's recurrences in float64; conditional and unconditional rows have equal samples."""

    def velocity(x, t):
        both = np.concatenate([x, x])
        conditional, unconditional = np.split((predict(both, t) - both) / max(1 - t, 0.05), 2)
        return unconditional + scale * (conditional - unconditional)

    if config.solver.startswith("multistep"):
        return multistep_reference(velocity, noise, config, shift)
    end = 0.95 if config.solver == "euler_maruyama" else 1.0
    times = [
        t and (1 / shift) / (1 / shift + 1 / t - 1)
        for t in np.linspace(0, end, config.head_steps + 1)
    ]
    x, fresh = noise[0].astype(np.float64), iter(noise[1:])
    for t, following in itertools.pairwise(times):
        dt, v = following - t, velocity(x, t)
        if config.solver == "euler_maruyama":
            x = x + ((1 + t) * v - x) * dt + np.sqrt(2 * (1 - t) * dt) * next(fresh)
        elif config.solver == "heun" and following < times[-1]:
            x = x + (v + velocity(x + v * dt, following)) / 2 * dt
        else:
            x = x + v * dt
    if config.solver == "euler_maruyama":
        x = x + velocity(x, 0.95) * 0.05
    assert next(fresh, None) is None
    return x


def multistep_reference(velocity, noise: np.ndarray, config: SamplerConfig, shift: float):
    """Integrates the linear equation with the extrapolated prediction by Gauss's quadrature."""
    power = 2 if config.solver == "multistep_sde" else 1
    times = [
        t and (1 / shift) / (1 / shift + 1 / t - 1)
        for t in np.linspace(0, 1 - 2 / (config.head_steps + 1), config.head_steps)
    ]
    nodes, weights = np.polynomial.legendre.leggauss(50)
    x, fresh, last = noise[0].astype(np.float64), iter(noise[1:]), None
    for i, (t, following) in enumerate(itertools.pairwise(times)):
        prediction = x + (1 - t) * velocity(x, t)
        slope = 0 if last is None else (prediction - last) / (t - times[i - 1])
        middle, half = (following + t) / 2, (following - t) / 2
        last, x = prediction, x * ((1 - following) / (1 - t)) ** power
        for s, weight in zip(middle + half * nodes, half * weights, strict=True):
            kernel = (1 + (power - 1) * s) / (1 - s) ** (power + 1)
            integrand = kernel * (prediction + slope * (s - t))
            x = x + weight * (1 - following) ** power * integrand
        if power == 2:
            variance = (1 - following) ** 2 - (1 - following) ** 4 / (1 - t) ** 2
            x = x + np.sqrt(variance) * next(fresh)
    assert next(fresh, None) is None
    return x + (1 - times[-1]) * velocity(x, times[-1])


def toy_predict(x, t, xp):
    """Mixes tokens and bits, and treats rows differently, as conditional and unconditional ones."""
    rows = xp.arange(x.shape[0])[:, None, None]
    return xp.tanh(1.5 * x[:, ::-1] + x[..., ::-1] * xp.cos(3 * t) + 0.3 * rows - t)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("kind", solvers.SOLVERS)
def test_against_a_slow_reference(kind, scale, shift):
    config = SamplerConfig(head_steps=6, solver=kind)
    solver = solvers.make_solver(config, shift)
    noise = np.asarray(jax.random.normal(jax.random.key(0), (solver.num_noises, 3, 4, 8)))
    times = solver.times()
    assert len(times) == solver.num_evaluations

    def velocity(x, i):
        own = (toy_predict(x, times[i], jnp) - x) / remaining_time(times[i])
        return guidance.guide(own, scale, separate=False)

    x = solver.solve(velocity, jnp.asarray(np.concatenate([noise, noise], axis=1)))
    expected = reference(functools.partial(toy_predict, xp=np), noise, config, shift, scale)
    np.testing.assert_array_equal(x[:3], x[3:])
    assert_close(x[:3], expected, 1e-5)


@pytest.mark.parametrize("kind", solvers.SOLVERS)
def test_the_result_is_the_last_prediction(kind):
    solver = solvers.make_solver(SamplerConfig(head_steps=10, solver=kind), time_shift=1.0)
    assert solver.num_evaluations == {"euler_maruyama": 11, "heun": 19}.get(kind, 10)
    times = solver.times()
    noise = jax.random.normal(jax.random.key(0), (solver.num_noises, 2, 4, 8))
    # The prediction is the number of the evaluation, counted from 0.
    x = solver.solve(lambda x, i: (i - x) / remaining_time(times[i]), noise)
    np.testing.assert_allclose(x, solver.num_evaluations - 1, atol=1e-4)


@pytest.mark.parametrize(("kind", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(kind, order):
    """Twice the steps make the error of dx/dt = x cos t smaller by 2 to the power of the order."""

    def error(steps: int) -> float:
        solver = solvers.make_solver(SamplerConfig(head_steps=steps, solver=kind), time_shift=1.0)
        times = solver.times()
        x = solver.solve(lambda x, i: x * jnp.cos(times[i]), jnp.ones((1, 1, 1, 1)))
        return abs(float(x[0, 0, 0]) - np.exp(np.sin(1.0)))

    assert np.log2(error(32) / error(64)) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("kind", ["multistep_sde", "multistep_ode"])
def test_order_of_multistep(kind):
    """Up to t = 0.95, without noise: the last step is the same for all numbers of steps."""

    def solve(intervals: int) -> float:
        config = SamplerConfig(head_steps=intervals + 1, solver=kind)
        solver = solvers.make_solver(config, time_shift=1.0)
        times = solver.times()
        noise = jnp.zeros((solver.num_noises, 1, 1, 1)).at[0].set(1.0)
        return float(solver.solve(lambda x, i: 4 * x * jnp.cos(6 * times[i]), noise)[0, 0, 0])

    first, second = np.diff([solve(intervals) for intervals in (80, 160, 320)])
    assert np.log2(first / second) == pytest.approx(2, abs=0.25)


def test_multistep_has_the_limit_of_the_released_solver():
    """Of many steps, with the same noise; both then evaluate at the same times."""

    def difference(steps: int) -> float:
        config = SamplerConfig(head_steps=steps + 1, solver="multistep_sde")
        ours = solvers.make_solver(config, time_shift=1.0)
        released = solvers.EulerMaruyama(steps)
        times = released.times()
        np.testing.assert_allclose(ours.times(), times, atol=1e-6)

        def velocity(x, i):
            return (toy_predict(x, times[i], jnp) - x) / remaining_time(times[i])

        noise = jax.random.normal(jax.random.key(0), (steps + 1, 3, 4, 8))
        return float(jnp.std(ours.solve(velocity, noise) - released.solve(velocity, noise)))

    assert difference(50) < 0.04
    assert difference(400) < difference(50) / 6
