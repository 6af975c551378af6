import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import assert_close
from random_params import random_params

from bitdance_jax.config import ConfigError, Qwen3Config
from bitdance_jax.nn import attention
from bitdance_jax.nn.stack import stack, unstack
from bitdance_jax.transformer.qwen3 import Qwen3


CONFIG = Qwen3Config(
    num_layers=2, dim=24, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=40, vocab_size=11
)
LENGTH = 11
BLOCK = 4
MASK = attention.block_causal_mask(LENGTH, LENGTH - 2 * BLOCK, BLOCK)


class Toy(NamedTuple):
    params: dict
    tokens: jax.Array
    hidden: jax.Array


def forward(model: Qwen3, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden, _ = model(model.embed(tokens), jnp.arange(LENGTH)[None], MASK[None])
    return hidden, model.logits(hidden)


@pytest.fixture(scope="module")
def toy() -> Toy:
    tokens = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, CONFIG.vocab_size)
    params = random_params(Qwen3(CONFIG), tokens, method=forward)
    hidden, logits = jax.jit(lambda p: Qwen3(CONFIG).apply({"params": p}, tokens, method=forward))(
        params
    )
    assert logits.shape == (2, LENGTH, CONFIG.vocab_size)
    assert_close(logits, hidden @ params["lm_head"]["kernel"], 1e-5)
    return Toy(params, tokens, hidden)


def test_scanned_layers_give_the_same_numbers(toy):
    def gradient(model, params):
        def loss(params):
            _, logits = model.apply({"params": params}, toy.tokens, method=forward)
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])

        return jax.jit(jax.grad(loss))(params)

    expected = gradient(Qwen3(CONFIG), toy.params)
    actual = unstack(gradient(Qwen3(CONFIG, scan=True, remat="dots"), stack(toy.params)))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(assert_close, actual, expected)


def test_rows_of_different_lengths_through_a_cache(toy):
    """Two rows, one with padding, read block by block, equal each row alone, read at once."""
    model = Qwen3(CONFIG)
    padding = 3
    slots = jnp.arange(padding + LENGTH)
    total = padding + LENGTH
    pad = jnp.array([0, padding])[:, None]
    rows = jnp.stack([jnp.pad(toy.tokens[0], (0, padding)), jnp.pad(toy.tokens[1], (padding, 0))])
    unpadded = [attention.block_causal_mask(total, total - 2 * BLOCK, BLOCK), MASK]

    @jax.jit
    def run(params):
        bound = model.bind({"params": params})
        x = bound.embed(rows)
        mask = jnp.asarray(unpadded[0]) & (slots >= pad)[:, None]
        cache = [
            attention.empty_cache(2, total, CONFIG.num_kv_heads, CONFIG.head_dim, jnp.float32)
        ] * CONFIG.num_layers
        parts = []
        for start, stop in (
            (0, total - 2 * BLOCK),
            (total - 2 * BLOCK, total - BLOCK),
            (total - BLOCK, total),
        ):
            positions = jnp.maximum(slots[None, start:stop] - pad, 0)
            y, cache = bound(
                x[:, start:stop], positions, mask[:, start:stop, :stop], cache, jnp.int32(start)
            )
            parts.append(y)
        alone, _ = bound(x[:1], slots[None], unpadded[0][None])
        return jnp.concatenate(parts, axis=1), alone

    together, alone = run(toy.params)
    assert_close(together[:1], alone, 1e-5)
    assert_close(together[1, padding:], toy.hidden[1], 1e-5)


def test_positions_count_by_their_distance(toy):
    """A shift of all rotary positions changes nothing, larger distances do."""
    model = Qwen3(CONFIG)

    @jax.jit
    def run(positions):
        bound = model.bind({"params": toy.params})
        return bound(bound.embed(toy.tokens), positions, MASK[None])[0]

    positions = jnp.arange(LENGTH)[None]
    assert_close(run(positions + 50), toy.hidden, 1e-4)
    assert np.max(np.abs(run(2 * positions) - toy.hidden)) > 0.01


@pytest.mark.parametrize(
    ("residual", "dtype"), [("float32", jnp.float32), ("compute", jnp.bfloat16)]
)
def test_bfloat16(toy, residual, dtype):
    model = Qwen3(dataclasses.replace(CONFIG, residual_dtype=residual), dtype=jnp.bfloat16)
    hidden, logits = jax.jit(lambda p: model.apply({"params": p}, toy.tokens, method=forward))(
        toy.params
    )
    assert (hidden.dtype, logits.dtype) == (dtype, jnp.bfloat16)
    assert_close(hidden.astype(jnp.float32), toy.hidden, 0.05)


def test_a_float32_residual_stream_is_nearer_to_float32(toy):
    """bfloat16 in 40 random layers: a bfloat16 residual stream is rounded in each of them."""
    config = dataclasses.replace(CONFIG, num_layers=40, dim=64, hidden_dim=128)
    params = random_params(Qwen3(config, scan=True), toy.tokens, method=forward)

    def hidden(residual, dtype):
        model = Qwen3(dataclasses.replace(config, residual_dtype=residual), scan=True, dtype=dtype)
        return np.asarray(
            jax.jit(lambda p: model.apply({"params": p}, toy.tokens, method=forward)[0])(params),
            np.float64,
        )

    exact = hidden("float32", jnp.float32)
    np.testing.assert_array_equal(hidden("compute", jnp.float32), exact)
    wide, narrow = (
        np.linalg.norm(hidden(residual, jnp.bfloat16) - exact)
        for residual in ("float32", "compute")
    )
    assert wide < 0.8 * narrow


def test_bad_sizes():
    with pytest.raises(ConfigError, match="num_kv_heads must divide num_heads, got 3 and 4"):
        dataclasses.replace(CONFIG, num_kv_heads=3)
    with pytest.raises(ConfigError, match="hidden_dim must be positive, got 0"):
        dataclasses.replace(CONFIG, hidden_dim=0)
