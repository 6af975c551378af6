import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bitdance_jax.config import FlowHeadConfig
from bitdance_jax.heads import flow_matching as objective


def config(**fields) -> FlowHeadConfig:
    return FlowHeadConfig(width=64, num_blocks=2, num_groups=1, **fields)


def test_time_shift():
    pieces = golden_models.read("pieces/pieces")
    shifted = objective.shift_time(jnp.asarray(pieces["time_shift.t"]), 3.0)
    np.testing.assert_allclose(shifted, pieces["time_shift.shift3"], rtol=1e-6)


def test_time_shift_keeps_the_ends():
    ends = jnp.array([0.0, 1.0])
    np.testing.assert_array_equal(objective.shift_time(ends, 3.0), ends)
    t = jnp.linspace(0, 1, 11)
    np.testing.assert_allclose(objective.shift_time(t, 1.0), t, rtol=1e-6)


@pytest.mark.parametrize("name", ["imagenet_1x", "imagenet_4x", "imagenet_16x"])
def test_recorded_times_and_noisy_bits(name):
    model = golden_models.class_conditional(name)
    golden = golden_models.read(f"{name}/train")
    t = objective.training_times(jnp.asarray(golden["t_normal"]), model.config.head)
    np.testing.assert_allclose(t, golden["t"], rtol=1e-5)
    # Bits are +-1, so they follow from the recorded x_t.
    shape = (len(t), model.config.tokens_per_step, model.config.tokenizer.bits)
    x_t = golden["x_t"].reshape(shape)
    noise = golden["noise"].reshape(shape)
    bits = np.sign(x_t - (1 - golden["t"][:, None, None]) * noise)
    np.testing.assert_allclose(
        objective.interpolate(jnp.asarray(bits), jnp.asarray(noise), t), x_t, atol=1e-5
    )


def test_logit_normal_times():
    normal = jax.random.normal(jax.random.key(0), (1000,))
    t = objective.training_times(normal, config(time_mean=0.3, time_std=1.2, time_shift=2.0))
    plain = 1 / (1 + np.exp(-(1.2 * np.asarray(normal, np.float64) + 0.3)))
    np.testing.assert_allclose(t, (1 / 2) / (1 / 2 + 1 / plain - 1), rtol=1e-5)


def test_uniform_times():
    t = objective.training_times(
        jax.random.normal(jax.random.key(0), (4000,)), config(time_distribution="uniform")
    )
    assert scipy.stats.kstest(np.asarray(t), "uniform").pvalue > 0.01


def test_interpolation_ends():
    bits, noise = jax.random.normal(jax.random.key(0), (2, 2, 4, 8))
    np.testing.assert_array_equal(objective.interpolate(bits, noise, jnp.zeros(2)), noise)
    np.testing.assert_array_equal(objective.interpolate(bits, noise, jnp.ones(2)), bits)


def test_velocity_loss():
    """The definition: the difference of two velocities, each over max(1 - t, 0.05)."""
    t = jnp.array([0.0, 0.3, 0.95, 0.99])
    predicted, bits, noise = jax.random.normal(jax.random.key(0), (3, 4, 2, 8))
    x_t = objective.interpolate(bits, noise, t)
    left = np.maximum(1 - np.asarray(t), 0.05)[:, None, None]
    expected = ((bits - x_t) / left - (predicted - x_t) / left) ** 2
    np.testing.assert_allclose(objective.velocity_loss(predicted, bits, t), expected, rtol=1e-3)
