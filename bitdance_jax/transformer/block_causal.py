"""The transformer of the class-conditional models (paper 3.3): RMSNorm on the input, pre-norm blocks, final RMSNorm."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from bitdance_jax.config import TransformerConfig
from bitdance_jax.distributed.constraints import constrain
from bitdance_jax.nn import attention, linear, rope
from bitdance_jax.nn.attention import KVCache, Mask
from bitdance_jax.nn.layers import FusedDense, SwiGLU, residual_dtype, transformer_init
from bitdance_jax.nn.stack import apply_layers, stacked


Rotary = tuple[Float[Array, "S half"], Float[Array, "S half"]]


class SelfAttention(nn.Module):
    """Multi-head attention with rotary positions, fused qkv and no biases; over its own tokens, or over a cache that they enter."""

    config: TransformerConfig
    dtype: DTypeLike = jnp.float32
    kernel: attention.Kernel = "xla"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        rotary: Rotary,
        mask: Mask,
        cache: KVCache | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        qkv = FusedDense(3, self.config.dim, use_bias=False, dtype=self.dtype, name="qkv")(x)
        q, k, v = (
            constrain(
                rearrange(x, "b s (n d) -> b n s d", n=self.config.num_heads),
                "batch",
                "heads",
                None,
                None,
            )
            for x in qkv
        )
        q, k = rope.rotate(q, *rotary), rope.rotate(k, *rotary)
        out, cache = attention.attend_through_cache(q, k, v, mask, self.kernel, cache, start)
        project = linear.Dense(
            self.config.dim,
            use_bias=False,
            kernel_init=transformer_init,
            dtype=self.dtype,
            name="out",
        )
        return project(rearrange(out, "b n s d -> b s (n d)")), cache


class Block(nn.Module):
    """Pre-norm attention and SwiGLU. Its two results are the scan's carry and output."""

    config: TransformerConfig
    dtype: DTypeLike = jnp.float32
    kernel: attention.Kernel = "xla"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        rotary: Rotary,
        mask: Mask,
        cache: KVCache | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        config = self.config
        y = nn.RMSNorm(config.norm_eps, dtype=self.dtype, name="attention_norm")(x)
        y, cache = SelfAttention(config, self.dtype, self.kernel, name="attention")(
            y, rotary, mask, cache, start
        )
        x = x + y
        y = nn.RMSNorm(config.norm_eps, dtype=self.dtype, name="mlp_norm")(x)
        x = x + SwiGLU(config.hidden_dim, config.dim, use_bias=False, dtype=self.dtype, name="mlp")(
            y
        )
        return constrain(x, "batch", None, None), cache


class BlockCausalTransformer(nn.Module):
    """Embedded tokens to hidden states.

    Attributes:
      config: sizes.
      scan: parameters stacked and layers scanned, for training; else one by one, which a cache needs.
      remat: what the backward pass keeps (`stack.remat_policy`); None keeps everything.
      dtype: compute type of the products; the residual stream has its own (`layers.residual_dtype`).
      kernel: attention kernel.
    """

    config: TransformerConfig
    scan: bool = False
    remat: str | None = None
    dtype: DTypeLike = jnp.float32
    kernel: attention.Kernel = "xla"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        rotary: Rotary,
        mask: Mask,
        cache: list[KVCache] | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B S D"], list[KVCache] | None]:
        """S new tokens, the first at position `start`.

        Args:
          rotary: cosines and sines of the new tokens' positions.
          mask: which of the first T positions each new token sees; T = S without a cache.
          cache: one per layer; the new tokens' keys and values are written into it before attending.

        Returns:
          Hidden states after the final norm, in the residual stream's type, and the cache with the new tokens.
        """
        config = self.config
        residual = residual_dtype(config.residual_dtype, self.dtype)
        x = nn.RMSNorm(config.norm_eps, dtype=residual, name="embedding_norm")(x)
        arguments: tuple[Any, ...] = (config, self.dtype, self.kernel)
        if self.scan:
            layers: Any = stacked(Block, config.num_layers, self.remat)(*arguments, name="layers")
        else:
            layers = [Block(*arguments, name=f"layers_{i}") for i in range(config.num_layers)]
        x, cache = apply_layers(layers, x, rotary, mask, cache=cache, start=start)
        return nn.RMSNorm(config.norm_eps, dtype=residual, name="norm")(x), cache
