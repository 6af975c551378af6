"""Layers that more than one part uses."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class SwiGLU(nn.Module):
    """Linear to two halves, silu(first) * second, Linear: the gated MLP with its first layer fused."""

    hidden: int
    features: int
    use_bias: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B D"]:
        gate, up = jnp.split(nn.Dense(2 * self.hidden, use_bias=self.use_bias, dtype=self.dtype, name="w1")(x), 2, axis=-1)
        return nn.Dense(self.features, use_bias=self.use_bias, dtype=self.dtype, name="w2")(nn.silu(gate) * up)
