"""Qwen3 (paper 4.3): pre-norm blocks of grouped-query attention and gated MLP, untied output."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from bitdance_jax.config import Qwen3Config
from bitdance_jax.distributed.constraints import constrain
from bitdance_jax.nn import attention, linear, rope
from bitdance_jax.nn.attention import KVCache, Mask
from bitdance_jax.nn.block import PreNormBlock, Rotary, merge_heads, split_heads
from bitdance_jax.nn.layers import residual_dtype, transformer_init
from bitdance_jax.nn.stack import apply_layers, repeat


def _dense(features: int, dtype: DTypeLike, name: str) -> nn.Dense:
    return linear.Dense(
        features, use_bias=False, kernel_init=transformer_init, dtype=dtype, name=name
    )


class GroupedQueryAttention(nn.Module):
    """Rotary attention with fewer key heads than query heads, and RMSNorm on each query and key."""

    config: Qwen3Config
    dtype: DTypeLike = jnp.float32
    kernel: attention.Kernel = "xla"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B Q D"],
        rotary: Rotary,
        mask: Mask,
        cache: KVCache | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B Q D"], KVCache | None]:
        config = self.config

        def project(name: str, num_heads: int) -> Float[Array, "B A Q F"]:
            return split_heads(_dense(num_heads * config.head_dim, self.dtype, name)(x), num_heads)

        def norm_and_rotate(name: str, heads: Float[Array, "B A Q F"]) -> Float[Array, "B A Q F"]:
            # In the residual stream's type, and rounded once, for the product.
            residual = residual_dtype(config.residual_dtype, self.dtype)
            normed = nn.RMSNorm(config.norm_eps, dtype=residual, name=name)(heads)
            return rope.rotate(normed, *rotary).astype(self.dtype)

        q = norm_and_rotate("q_norm", project("q", config.num_heads))
        k = norm_and_rotate("k_norm", project("k", config.num_kv_heads))
        v = project("v", config.num_kv_heads)
        out, cache = attention.attend_through_cache(q, k, v, mask, self.kernel, cache, start)
        return _dense(config.dim, self.dtype, "out")(merge_heads(out)), cache


class GatedMLP(nn.Module):
    """silu(gate) * up, Linear: SwiGLU with two first layers, as Qwen3 stores them."""

    config: Qwen3Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Q D"]) -> Float[Array, "B Q D"]:
        width = self.config.hidden_dim
        gate = nn.silu(_dense(width, self.dtype, "gate")(x))
        hidden = constrain(gate * _dense(width, self.dtype, "up")(x), "batch", None, "hidden")
        return _dense(self.config.dim, self.dtype, "down")(hidden)


class Qwen3(nn.Module):
    """Token ids to embeddings, embeddings to hidden states, hidden states to logits.

    Attributes:
      config: sizes.
      scan: parameters stacked and layers scanned, for training; or unrolled, as a cache needs them.
      remat: what the backward pass stores (`stack.remat_policy`); None: everything.
      dtype: compute type of the products; the residual stream has its own
        (`layers.residual_dtype`).
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
        # Rows are looked up in the table's own type: converting the table first would copy it.
        looked_up = self.dtype if config.residual_dtype == "compute" else None
        self.embed_tokens = linear.Embed(
            config.vocab_size, config.dim, dtype=looked_up, embedding_init=transformer_init
        )
        self.layers = repeat(
            PreNormBlock,
            config.num_layers,
            scan=self.scan,
            remat=self.remat,
            make_attention=functools.partial(
                GroupedQueryAttention, config, self.dtype, self.kernel
            ),
            make_mlp=functools.partial(GatedMLP, config, self.dtype),
            norm_eps=config.norm_eps,
            dtype=self.dtype,
        )
        self.norm = nn.RMSNorm(config.norm_eps, dtype=self._residual)
        self.lm_head = linear.Dense(
            config.vocab_size, use_bias=False, kernel_init=transformer_init, dtype=self.dtype
        )

    def embed(self, tokens: Int[Array, "B Q"]) -> Float[Array, "B Q D"]:
        return constrain(self.embed_tokens(tokens).astype(self._residual), "batch", None, None)

    def logits(self, hidden: Float[Array, "B Q D"]) -> Float[Array, "B Q V"]:
        """The next token's logits. Sampling needs neither them nor the weights of `lm_head`."""
        return self.lm_head(hidden)

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        positions: Int[Array, "#B Q"],
        mask: Mask,
        cache: list[KVCache] | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B Q D"], list[KVCache] | None]:
        """Hidden states of Q new tokens, the first at position `start` of the cache.

        Args:
          x: embedded tokens.
          positions: of the new tokens, for the rotary embedding; rows may differ.
          mask: which of the first T positions of the cache each new token sees; T = Q without one.
          cache: one per layer.
          start: position of the first new token in the cache.

        Returns:
          Hidden states after the final norm, in the residual stream's type, and the cache with the
          new tokens.
        """
        config = self.config
        rotary = rope.rotary_1d(
            positions, config.head_dim, config.rope_base, jnp.dtype(config.rotary_dtype)
        )
        x, cache = apply_layers(
            self.layers, x.astype(self._residual), rotary, mask, cache=cache, start=start
        )
        return self.norm(x), cache

    def next_token_logits(self, tokens: Int[Array, "B Q"]) -> Float[Array, "B Q V"]:
        """Of texts without images, each token of which sees the ones before it."""
        length = tokens.shape[1]
        mask = attention.block_causal_mask(length, length, 1)
        hidden, _ = self(self.embed(tokens), jnp.arange(length)[None], mask[None])
        return self.logits(hidden)


def abstract_params(config: Qwen3Config) -> Any:
    """Shapes of the stacked parameters of a language model alone, float32."""
    model = Qwen3(config, scan=True)
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(
        lambda: model.init(jax.random.key(0), tokens, method="next_token_logits")["params"]
    )
