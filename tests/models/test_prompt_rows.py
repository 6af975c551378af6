"""Prompts that show images, as rows of tokens and as the language model reads them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from random_params import random_params

from bitdance_jax.models import text_to_image
from bitdance_jax.models.prompt_rows import ShownImage, pad_prompts, prefix_rows
from bitdance_jax.models.text_to_image import TextToImage, token_positions
from bitdance_jax.models.token_reader import TokenReader


CONFIG = tiny_models.TEXT_TO_IMAGE
IDS = CONFIG.image_tokens
BITS = CONFIG.tokenizer.bits
MAX_TOKENS = 3


@pytest.fixture(scope="module")
def image() -> ShownImage:
    """Of 8 x 4 pixels: 4 x 2 tokens."""
    bits = np.random.default_rng(0).choice([-1, 1], (8, BITS)).astype(np.int8)
    return ShownImage(bits, (8, 4))


@pytest.fixture(scope="module")
def params():
    xy = jnp.asarray(token_positions(CONFIG, 4, 4))
    model = TextToImage(CONFIG)
    return random_params(
        model, jnp.zeros((1, 4), jnp.int32), xy, jnp.zeros((1, 4, BITS)), method=_logits
    )


def _logits(model, tokens, xy, bits):
    """Touches all parameters of language model and connector."""
    hidden, _ = model.hidden(tokens, xy, bits)
    return model.text.logits(hidden)


def test_rows(image):
    prefixes = prefix_rows(CONFIG, [[5, image, 6, 7], [8]], 4, 4)
    tokens, padding, shown = prefixes
    # The longest row has 5, three tokens, 8 visual ones, 6, 7, and two before the first block.
    assert tokens.shape == (2, 64 + CONFIG.tokens_per_step)
    assert padding.tolist() == [64 - 2 - 14, 64 - 2 - 1]
    start = [IDS.vision_start, IDS.first_resolution + 3, IDS.first_resolution + 1]
    assert tokens[0, padding[0] :].tolist()[:14] == [5, *start, *[0] * 8, 6, 7]
    assert tokens[1, padding[1]] == 8
    first = padding[0] + 4
    assert shown.slots[0, :8].tolist() == list(range(first, first + 8))
    # Unused places are behind the end, where they are dropped.
    assert (shown.slots[0, 8:] == tokens.shape[1]).all()
    assert (shown.slots[1] == tokens.shape[1]).all()
    np.testing.assert_array_equal(shown.bits[0, :8], image.bits)
    np.testing.assert_array_equal(shown.xy[0, :8], token_positions(CONFIG, 8, 4))


def test_long_prompts_are_padded_to_multiples():
    large = ShownImage(np.ones((1024, BITS), np.int8), (64, 64))
    assert pad_prompts(CONFIG, [[large, 1]], []).tokens.shape[1] == 2048
    assert prefix_rows(CONFIG, [[1], [2, 3]], 4, 4).shown is None


@pytest.mark.parametrize("chunk", [1024, 32])
def test_answers_read_the_prompt_causally(image, params, chunk, monkeypatch):
    """Logits as of one forward pass over the row alone, with the image's embeddings in place."""
    monkeypatch.setattr(text_to_image, "CHUNK", chunk)
    model = TextToImage(CONFIG)
    prompts = [[5, image, 6, 7], [8, 9]]
    answer = [11, 12]

    @jax.jit
    def read(params):
        reader = TokenReader(model, params, pad_prompts(CONFIG, prompts, []), MAX_TOKENS)
        logits, cache = reader.read_prompts()
        steps = [logits]
        for number, token in enumerate(answer):
            tokens = jnp.full(2, token, jnp.int32)
            logits, cache = reader.read_token(tokens, jnp.int32(number), cache)
            steps.append(logits)
        return jnp.stack(steps, axis=1)

    start = [IDS.vision_start, IDS.first_resolution + 3, IDS.first_resolution + 1]
    rows = [[5, *start, *[0] * 8, 6, 7, *answer], [8, 9, *answer]]

    @jax.jit
    def forward(params):
        bound = model.bind({"params": params})
        out = []
        for number, row in enumerate(rows):
            x = bound.embed_prefix(jnp.array([row]))
            if number == 0:
                xy = jnp.asarray(token_positions(CONFIG, 8, 4))
                x = x.at[:, 4:12].set(bound.embed_bits(jnp.float32(image.bits[None]), xy))
            causal = np.tril(np.ones((1, len(row), len(row)), bool))
            hidden, _ = bound.read(x, jnp.arange(len(row))[None], causal)
            out.append(bound.text.logits(hidden[:, -3:])[0])
        return jnp.stack(out)

    expected = np.asarray(forward(params))
    np.testing.assert_allclose(read(params), expected, atol=2e-5 * np.abs(expected).max())
