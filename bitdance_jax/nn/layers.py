"""Dense layers and settings that transformers and heads share."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bitdance_jax.distributed.constraints import constrain
from bitdance_jax.nn import linear


# The transformers have GPT-2's scale. The flow head follows DiT: Xavier, and zeros for layers after
# which a block starts as the identity.
transformer_init = nn.initializers.normal(0.02)
head_init = nn.initializers.xavier_uniform()


def residual_dtype(setting: Literal["float32", "compute"], dtype: DTypeLike) -> jnp.dtype:
    """The type of embeddings, residual stream and final norm.

    In float32, as under PyTorch's autocast, only the products of the layers run in the compute
    type. A bfloat16 stream is rounded once for each layer, so its error grows with depth.

    Args:
      setting: `TransformerConfig.residual_dtype`.
      dtype: compute type.
    """
    return jnp.dtype(dtype) if setting == "compute" else jnp.promote_types(dtype, jnp.float32)


class FusedDense(nn.Module):
    """`parts` linear layers of the same input as one product.

    The kernel is [C, parts, features], the bias [parts, features]. Sharding the axis `features`
    then shards every part in the same way.
    """

    parts: int
    features: int
    use_bias: bool
    kernel_init: nn.initializers.Initializer = transformer_init
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> list[Float[Array, "*B D"]]:
        shape = (self.parts, self.features)
        y = linear.DenseGeneral(
            shape, use_bias=self.use_bias, kernel_init=self.kernel_init, dtype=self.dtype
        )
        nn.share_scope(self, y)
        return [part.squeeze(-2) for part in jnp.split(y(x), self.parts, axis=-2)]


class SwiGLU(nn.Module):
    """Linear to two halves, silu(first) * second, Linear: a gated MLP, first layer fused."""

    hidden: int
    features: int
    use_bias: bool
    kernel_init: nn.initializers.Initializer = transformer_init
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B D"]:
        gate, up = FusedDense(
            2, self.hidden, self.use_bias, self.kernel_init, self.dtype, name="w1"
        )(x)
        inner = constrain(nn.silu(gate) * up, "batch", *[None] * (x.ndim - 2), "hidden")
        return linear.Dense(
            self.features,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            name="w2",
        )(inner)
