"""The language model alone, which answers a prompt in text."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bitdance_jax.models.text_to_image import (
    Prefixes,
    TextToImage,
    positions_in_text,
    read_causally,
)
from bitdance_jax.nn.attention import KVCache


class TokenReader:
    """The model with its weights and prompts (`sampling.next_token.TokenModel`)."""

    def __init__(
        self, model: TextToImage, params: Any, prefixes: Prefixes, max_tokens: int
    ) -> None:
        """
        Args:
          model: with unrolled layers; `params` likewise, with `text/lm_head`.
          prefixes: `pad_prompts` of the prompts alone.
          max_tokens: of an answer.
        """
        self._bound = model.bind({"params": params})
        self._dtype = jnp.dtype(model.dtype)
        self._prefixes = prefixes
        self._before = prefixes.tokens.shape[1]
        slots = self._before + max_tokens
        self._positions, self._filled = positions_in_text(prefixes.padding, slots)

    def read_prompts(self) -> tuple[Float[Array, "B V"], list[KVCache] | None]:
        x = self._bound.embed_prompts(jnp.asarray(self._prefixes.tokens), self._prefixes.shown)
        hidden, cache = read_causally(self._bound, x, self._positions, self._filled, self._dtype)
        return self._bound.text.logits(hidden[:, -1:])[:, 0], cache

    def read_token(
        self, tokens: Int[Array, "B"], number: Int[Array, ""], cache: list[KVCache] | None
    ) -> tuple[Float[Array, "B V"], list[KVCache] | None]:
        slot = self._before + number
        slots = self._filled.shape[1]
        mask = self._filled & (jnp.arange(slots) <= slot)
        positions = jax.lax.dynamic_slice_in_dim(self._positions, slot, 1, axis=1)
        x = self._bound.embed_prefix(tokens[:, None])
        hidden, cache = self._bound.read(x, positions, mask[:, None], cache, slot)
        return self._bound.text.logits(hidden)[:, 0], cache
