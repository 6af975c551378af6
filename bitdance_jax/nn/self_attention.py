"""Multi-head self-attention with rotary positions."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from bitdance_jax.nn import attention, linear, rope
from bitdance_jax.nn.attention import BlockCausal, KVCache, Mask
from bitdance_jax.nn.block import Rotary, merge_heads, split_heads
from bitdance_jax.nn.layers import FusedDense, transformer_init


class SelfAttention(nn.Module):
    """Multi-head attention with rotary positions, fused qkv and no biases.

    Attributes:
      dim: width.
      num_heads: attention heads.
      dtype: compute type.
      kernel: attention kernel.
    """

    dim: int
    num_heads: int
    dtype: DTypeLike = jnp.float32
    kernel: attention.Kernel = "xla"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B Q D"],
        rotary: Rotary,
        mask: Mask | None,
        cache: KVCache | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B Q D"], KVCache | None]:
        qkv = FusedDense(3, self.dim, use_bias=False, dtype=self.dtype, name="qkv")(x)
        if self.kernel == "pallas" and isinstance(mask, BlockCausal):
            # Pallas takes a third of a second to import, and only TPUs need it.
            from bitdance_jax.nn import tpu_attention

            out = tpu_attention.attend(qkv, rotary, mask.prefix, mask.block, self.num_heads)
        else:
            q, k, v = (split_heads(part, self.num_heads) for part in qkv)
            q = rope.rotate(q, *rotary)
            k = rope.rotate(k, *rotary)
            out, cache = attention.attend_through_cache(q, k, v, mask, self.kernel, cache, start)
            out = merge_heads(out)
        project = linear.Dense(
            self.dim, use_bias=False, kernel_init=transformer_init, dtype=self.dtype, name="out"
        )
        return project(out), cache
