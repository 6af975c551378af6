"""Text sampled token by token, as the released model answers (paper 4.3)."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bitdance_jax.config.sampler import TextSamplerConfig


Cache = Any


@runtime_checkable
class TokenModel(Protocol):
    """What the sampler needs of a language model with its weights and the prompts of B rows."""

    def read_prompts(self) -> tuple[Float[Array, "B V"], Cache]:
        """Logits of the first token after each prompt, and the cache."""

    def read_token(
        self, tokens: Int[Array, "B"], number: Int[Array, ""], cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits of the token after sampled token `number` (0 for the first), and the cache."""


class _State(NamedTuple):
    """`tokens` [B, T] so far, `length` of each row or T while it goes on, and the next logits."""

    tokens: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    logits: Float[Array, "B V"]
    cache: Cache
    number: Int[Array, ""]


def sample_text(
    model: TokenModel, keys: Array, end: int, config: TextSamplerConfig
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """Tokens until the token `end`, `config.max_tokens` T at most.

    Args:
      model: see TokenModel.
      keys: random keys [B], one for each row.
      end: the token that ends a text.
      config: temperature, top-k and top-p.

    Returns:
      Tokens, and how many of them come before the end.
    """
    logits, cache = model.read_prompts()
    length = config.max_tokens
    rows = len(logits)
    state = _State(
        jnp.zeros((rows, length), jnp.int32),
        jnp.full(rows, length, jnp.int32),
        logits,
        cache,
        jnp.int32(0),
    )

    def goes_on(state: _State) -> Array:
        return (state.number < length) & jnp.any(state.lengths == length)

    def step(state: _State) -> _State:
        number = state.number
        folded = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        chosen = jax.vmap(lambda key, row: sample_token(key, row, config))(folded, state.logits)
        ended = (chosen == end) & (state.lengths == length)
        lengths = jnp.where(ended, number, state.lengths)
        tokens = state.tokens.at[:, number].set(chosen)
        logits, cache = model.read_token(chosen, number, state.cache)
        return _State(tokens, lengths, logits, cache, number + 1)

    final = jax.lax.while_loop(goes_on, step, state)
    return final.tokens, final.lengths


def sample_token(
    key: Array, logits: Float[Array, "V"], config: TextSamplerConfig
) -> Int[Array, ""]:
    """One token: of the `top_k` likeliest, the fewest whose probabilities reach `top_p`."""
    if config.temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32)
    count = min(config.top_k or len(logits), len(logits))
    scaled, tokens = jax.lax.top_k(logits.astype(jnp.float32) / config.temperature, count)
    before = jnp.cumsum(jax.nn.softmax(scaled)) - jax.nn.softmax(scaled)
    kept = jnp.where(before < config.top_p, scaled, -jnp.inf)
    return tokens[jax.random.categorical(key, kept)].astype(jnp.int32)
