"""Qwen3 (paper 4.3): grouped-query attention with q/k norms and rotate-half RoPE, a gated MLP, pre-norm blocks, an untied output layer."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from bitdance_jax.config import Qwen3Config
from bitdance_jax.distributed.constraints import constrain
from bitdance_jax.nn import attention, linear, rope
from bitdance_jax.nn.attention import KVCache, Mask
from bitdance_jax.nn.layers import residual_dtype, transformer_init
from bitdance_jax.nn.stack import apply_layers, stacked


Rotary = tuple[Float[Array, "#B S half"], Float[Array, "#B S half"]]


def _dense(features: int, dtype: DTypeLike, name: str) -> nn.Dense:
    return linear.Dense(
        features, use_bias=False, kernel_init=transformer_init, dtype=dtype, name=name
    )


class GroupedQueryAttention(nn.Module):
    """Rotary attention with fewer key heads than query heads, RMSNorm on each query and key; over its own tokens or over a cache."""

    config: Qwen3Config
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

        def heads(name: str, count: int) -> Float[Array, "B N S D"]:
            y = rearrange(
                _dense(count * config.head_dim, self.dtype, name)(x),
                "b s (n d) -> b n s d",
                n=count,
            )
            return constrain(y, "batch", "heads", None, None)

        # Normed and rotated in the residual stream's type, and rounded once, for the product.
        residual = residual_dtype(config.residual_dtype, self.dtype)
        q = nn.RMSNorm(config.norm_eps, dtype=residual, name="q_norm")(heads("q", config.num_heads))
        k = nn.RMSNorm(config.norm_eps, dtype=residual, name="k_norm")(
            heads("k", config.num_kv_heads)
        )
        v = heads("v", config.num_kv_heads)
        q, k = (rope.rotate(x, *rotary).astype(self.dtype) for x in (q, k))
        out, cache = attention.attend_through_cache(q, k, v, mask, self.kernel, cache, start)
        return _dense(config.dim, self.dtype, "out")(rearrange(out, "b n s d -> b s (n d)")), cache


class GatedMLP(nn.Module):
    """silu(gate) * up, Linear: SwiGLU with two first layers, as Qwen3 stores them."""

    config: Qwen3Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        width, dtype = self.config.hidden_dim, self.dtype
        hidden = nn.silu(_dense(width, dtype, "gate")(x)) * _dense(width, dtype, "up")(x)
        return _dense(self.config.dim, dtype, "down")(constrain(hidden, "batch", None, "hidden"))


class Qwen3Block(nn.Module):
    """Pre-norm attention and gated MLP. Its two results are the scan's carry and output."""

    config: Qwen3Config
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
        y, cache = GroupedQueryAttention(config, self.dtype, self.kernel, name="attention")(
            y, rotary, mask, cache, start
        )
        x = x + y
        y = nn.RMSNorm(config.norm_eps, dtype=self.dtype, name="mlp_norm")(x)
        return constrain(
            x + GatedMLP(config, self.dtype, name="mlp")(y), "batch", None, None
        ), cache


class Qwen3(nn.Module):
    """Token ids to embeddings, embeddings to hidden states, hidden states to logits.

    Attributes:
      config: sizes.
      scan: parameters stacked and layers scanned, for training; else one by one, which a cache needs.
      remat: what the backward pass keeps (`stack.remat_policy`); None keeps everything.
      dtype: compute type of the products; the residual stream has its own (`layers.residual_dtype`).
      kernel: attention kernel.
    """

    config: Qwen3Config
    scan: bool = False
    remat: str | None = None
    dtype: DTypeLike = jnp.float32
    kernel: attention.Kernel = "xla"

    def setup(self) -> None:
        config = self.config
        self._residual = residual_dtype(config.residual_dtype, self.dtype)
        # Rows are looked up in the table's own type: converted first, a whole table would be copied.
        looked_up = self.dtype if config.residual_dtype == "compute" else None
        self.embed_tokens = linear.Embed(
            config.vocab_size, config.dim, dtype=looked_up, embedding_init=transformer_init
        )
        arguments: tuple[Any, ...] = (config, self.dtype, self.kernel)
        if self.scan:
            self.layers: Any = stacked(Qwen3Block, config.num_layers, self.remat)(*arguments)
        else:
            self.layers = [Qwen3Block(*arguments) for _ in range(config.num_layers)]
        self.norm = nn.RMSNorm(config.norm_eps, dtype=self._residual)
        self.lm_head = linear.Dense(
            config.vocab_size, use_bias=False, kernel_init=transformer_init, dtype=self.dtype
        )

    def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        return constrain(self.embed_tokens(tokens).astype(self._residual), "batch", None, None)

    def logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """The next token's logits. Only training on text needs them: sampling does without the weights of `lm_head`."""
        return self.lm_head(hidden)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "#B S"],
        mask: Mask,
        cache: list[KVCache] | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B S D"], list[KVCache] | None]:
        """Hidden states of S new tokens, written into the cache's slots from `start` on.

        Args:
          positions: of the new tokens, for the rotary embedding; rows may differ.
          mask: which of the first T slots each new token sees; T = S without a cache.
          cache: one per layer.

        Returns:
          Hidden states after the final norm, in the residual stream's type, and the cache with the new tokens.
        """
        rotary = rope.rotary_1d(positions, self.config.head_dim, self.config.rope_base)
        x, cache = apply_layers(
            self.layers, x.astype(self._residual), rotary, mask, cache=cache, start=start
        )
        return self.norm(x), cache
