import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import largest_error

from bitdance_jax.nn import linear


LAYERS = {
    "dense": (linear.Dense(5, dtype=jnp.bfloat16), (64, 7, 8)),
    "fused": (linear.DenseGeneral((3, 5), dtype=jnp.bfloat16), (64, 7, 8)),
    "strides": (
        linear.Conv(5, (3, 3), strides=(2, 2), padding=1, dtype=jnp.bfloat16),
        (8, 8, 9, 3),
    ),
    "same": (linear.Conv(5, (2, 3), strides=(2, 2), dtype=jnp.bfloat16), (8, 8, 9, 3)),
}


def gradients(layer: nn.Module, params: dict, x: jax.Array) -> tuple[dict, jax.Array]:
    """Of a sum of the outputs with weights that bfloat16 has exactly."""

    def weighted_sum(params: dict, x: jax.Array) -> jax.Array:
        y = layer.apply({"params": params}, x)
        assert y.dtype == layer.dtype
        weights = jnp.arange(y.size).reshape(y.shape) * 37 % 11 - 5
        return jnp.sum(y.astype(jnp.float32) * weights)

    return jax.jit(jax.grad(weighted_sum, argnums=(0, 1)))(params, x)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_summed_in_float32(name):
    """Gradients of kernels and biases, up to float32's rounding; that of the inputs as before."""
    layer, shape = LAYERS[name]
    x = jax.random.normal(jax.random.key(0), shape).astype(jnp.bfloat16)
    params = layer.init(jax.random.key(1), x)["params"]
    exact, _ = gradients(layer.clone(dtype=jnp.float32), params, x.astype(jnp.float32))
    _, to_inputs = gradients(layer, params, x)
    with linear.gradient_sums(jnp.dtype(jnp.float32)):
        wide, same_to_inputs = gradients(layer, params, x)
    np.testing.assert_array_equal(same_to_inputs, to_inputs)
    for part in ("kernel", "bias"):
        assert largest_error(wide[part], exact[part]) < 1e-6


def test_without_the_context_nothing_changes():
    """The layer equals Flax's, also its derivatives in forward mode."""
    layer, shape = LAYERS["dense"]
    x = jax.random.normal(jax.random.key(0), shape)
    params = layer.init(jax.random.key(1), x)
    plain = nn.Dense(5, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(layer.apply(params, x), plain.apply(params, x))
    jax.jvp(lambda x: layer.apply(params, x), (x,), (x,))
