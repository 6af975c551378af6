"""The transformer of the class-conditional models (paper 3.3).

RMSNorm on the input, pre-norm blocks, final RMSNorm.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from bitdance_jax.config import TransformerConfig
from bitdance_jax.nn import attention
from bitdance_jax.nn.attention import KVCache, Mask
from bitdance_jax.nn.block import PreNormBlock, Rotary
from bitdance_jax.nn.layers import SwiGLU, residual_dtype
from bitdance_jax.nn.self_attention import SelfAttention
from bitdance_jax.nn.stack import apply_layers, repeat


class BlockCausalTransformer(nn.Module):
    """Embedded tokens to hidden states.

    Attributes:
      config: sizes.
      scan: parameters stacked and layers scanned, for training; or unrolled, as a cache needs them.
      remat: what the backward pass stores (`stack.remat_policy`); None: everything.
      dtype: compute type of the products; the residual stream has its own
        (`layers.residual_dtype`).
      kernel: attention kernel.
    """

    config: TransformerConfig
    scan: bool = False
    remat: str | None = None
    dtype: DTypeLike = jnp.float32
    kernel: attention.Kernel = "xla"

    def setup(self) -> None:
        config = self.config
        residual = residual_dtype(config.residual_dtype, self.dtype)
        self.embedding_norm = nn.RMSNorm(config.norm_eps, dtype=residual)
        self.layers = repeat(
            PreNormBlock,
            config.num_layers,
            scan=self.scan,
            remat=self.remat,
            make_attention=functools.partial(
                SelfAttention, config.dim, config.num_heads, self.dtype, self.kernel
            ),
            make_mlp=functools.partial(
                SwiGLU, config.hidden_dim, config.dim, use_bias=False, dtype=self.dtype
            ),
            norm_eps=config.norm_eps,
            dtype=self.dtype,
        )
        self.norm = nn.RMSNorm(config.norm_eps, dtype=residual)

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        rotary: Rotary,
        mask: Mask,
        cache: list[KVCache] | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B Q D"], list[KVCache] | None]:
        """Hidden states of Q new tokens, the first at position `start`.

        Args:
          x: embedded tokens.
          rotary: of the new tokens' positions.
          mask: which of the first T positions each new token sees; T = Q without a cache.
          cache: one per layer; the new tokens' keys and values are written into it before
            attention.
          start: position of the first new token in the cache.

        Returns:
          Hidden states after the final norm, in the residual stream's type, and the cache with the
          new tokens.
        """
        x = self.embedding_norm(x)
        x, cache = apply_layers(self.layers, x, rotary, mask, cache=cache, start=start)
        return self.norm(x), cache
