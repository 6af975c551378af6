"""Layers that more than one part uses."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


# GPT-2's scale, for the transformers; the flow head follows DiT (Xavier, and zeros where a block shall start as the identity).
transformer_init = nn.initializers.normal(0.02)
head_init = nn.initializers.xavier_uniform()


class SwiGLU(nn.Module):
    """Linear to two halves, silu(first) * second, Linear: the gated MLP with its first layer fused."""

    hidden: int
    features: int
    use_bias: bool
    kernel_init: nn.initializers.Initializer = transformer_init
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B D"]:
        def linear(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=self.use_bias, kernel_init=self.kernel_init, dtype=self.dtype, name=name)

        gate, up = jnp.split(linear(2 * self.hidden, "w1")(x), 2, axis=-1)
        return linear(self.features, "w2")(nn.silu(gate) * up)
