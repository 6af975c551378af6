"""Text sampled token by token, with a language model whose logits are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitdance_jax.config import TextSamplerConfig
from bitdance_jax.sampling.next_token import sample_text, sample_token


LOGITS = np.log([0.4, 0.3, 0.15, 0.1, 0.05]).astype(np.float32)


class Counting:
    """After token n comes n + 1; the rows start at 3 and 5. The cache is the last token."""

    def read_prompts(self):
        return self._logits(jnp.array([2, 4])), jnp.array([2, 4])

    def read_token(self, tokens, number, cache):
        # The cache has what was sampled before.
        consistent = jnp.all(cache + 1 == tokens) & (tokens[0] == number + 3)
        return jnp.where(consistent, self._logits(tokens), -jnp.inf), tokens

    def _logits(self, tokens):
        return 100.0 * jax.nn.one_hot(tokens + 1, 10)


@pytest.mark.parametrize("end", [7, 9])
def test_texts_end_at_the_end_token(end):
    """Each row by itself; one that does not end has the greatest length."""
    keys = jax.random.split(jax.random.key(0), 2)
    config = TextSamplerConfig(max_tokens=5)
    sample = jax.jit(lambda keys: sample_text(Counting(), keys, end, config))
    tokens, lengths = (np.asarray(x) for x in sample(keys))
    expected = [min(end - start, 5) for start in (3, 5)]
    assert lengths.tolist() == expected
    for row, start, length in zip(tokens, (3, 5), expected, strict=True):
        assert row[:length].tolist() == list(range(start, start + length))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TextSamplerConfig(top_k=None, top_p=1.0), [0.4, 0.3, 0.15, 0.1, 0.05]),
        (TextSamplerConfig(top_k=2, top_p=1.0), [4 / 7, 3 / 7, 0, 0, 0]),
        # 0.4 and 0.3 do not reach 0.75, and 0.15 more do.
        (TextSamplerConfig(top_p=0.75), [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
        (TextSamplerConfig(top_p=1e-6), [1, 0, 0, 0, 0]),
        (TextSamplerConfig(temperature=0.0), [1, 0, 0, 0, 0]),
        # Probabilities squared: 0.16 + 0.09 + 0.0225 + 0.01 + 0.0025.
        (
            TextSamplerConfig(temperature=0.5, top_p=1.0),
            (np.exp(2 * LOGITS) / np.exp(2 * LOGITS).sum()).tolist(),
        ),
    ],
)
def test_probabilities(config, expected):
    count = 20_000
    keys = jax.random.split(jax.random.key(1), count)
    shuffled = np.array([3, 0, 4, 2, 1])  # The order of tokens does not matter.
    logits = jnp.asarray(LOGITS)[shuffled]
    sampled = jax.jit(jax.vmap(lambda key: sample_token(key, logits, config)))(keys)
    shares = np.bincount(shuffled[np.asarray(sampled)], minlength=5) / count
    # Four standard deviations.
    np.testing.assert_allclose(shares, expected, atol=4 * 0.5 / np.sqrt(count))
    assert not shares[np.array(expected) == 0].any()
