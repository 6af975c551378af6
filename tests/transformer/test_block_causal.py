import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import assert_close
from random_params import random_params

from bitdance_jax.config import TransformerConfig
from bitdance_jax.nn import attention, rope
from bitdance_jax.nn.stack import stack, unstack
from bitdance_jax.transformer import order
from bitdance_jax.transformer.block_causal import BlockCausalTransformer


CONFIG = TransformerConfig(num_layers=3, dim=32, num_heads=4)
PREFIX = 5
GRID = 4
TOTAL = PREFIX + GRID**2


@functools.cache
def rotary() -> tuple[jax.Array, jax.Array]:
    xy = (order.token_positions(GRID, GRID, 2, "patch") + 1.5).astype(np.float32)
    angles = np.concatenate(
        [
            np.zeros((PREFIX, 4), np.float32),
            rope.rotary_angles_2d(xy, CONFIG.head_dim, CONFIG.rope_base),
        ]
    )
    return jnp.cos(angles), jnp.sin(angles)


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (2, TOTAL, CONFIG.dim))


@pytest.fixture(scope="module")
def params(x) -> dict:
    return random_params(
        BlockCausalTransformer(CONFIG), x, rotary(), attention.block_causal_mask(TOTAL, 0, 1)
    )


def value_and_gradient(model, params, x):
    mask = attention.block_causal_mask(TOTAL, PREFIX, 4)

    def loss(params):
        y, _ = model.apply({"params": params}, x, rotary(), mask)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

    return jax.jit(jax.grad(loss, has_aux=True))(params)


@pytest.fixture(scope="module")
def unrolled(params, x):
    return value_and_gradient(BlockCausalTransformer(CONFIG), params, x)


@pytest.mark.parametrize("remat", [None, "nothing", "dots"])
def test_scanned_layers_give_the_same_numbers(params, x, unrolled, remat):
    gradient, y = value_and_gradient(
        BlockCausalTransformer(CONFIG, scan=True, remat=remat), stack(params), x
    )
    expected_gradient, expected = unrolled
    assert_close(y, expected, 1e-5)
    jax.tree.map(assert_close, unstack(gradient), expected_gradient)


def test_what_a_token_depends_on(params, unrolled, x):
    """A change of one token affects its own block and later ones only."""
    changed = x.at[:, PREFIX + 6].add(1.0)
    mask = attention.block_causal_mask(TOTAL, PREFIX, 4)
    y, _ = jax.jit(BlockCausalTransformer(CONFIG).apply)(
        {"params": params}, changed, rotary(), mask
    )
    moved = np.abs(y - unrolled[1]).max(axis=(0, 2)) > 1e-5
    np.testing.assert_array_equal(moved, np.arange(TOTAL) >= PREFIX + 4)


@pytest.mark.parametrize("block_causal", [True, False], ids=["block_causal", "causal"])
@pytest.mark.parametrize("tokens_per_step", [1, 4])
def test_cached_decoding_equals_one_pass(params, x, tokens_per_step, block_causal):
    """The prefix at once, then `tokens_per_step` tokens at a time, through the cache."""
    model = BlockCausalTransformer(CONFIG)
    mask = jnp.asarray(
        attention.block_causal_mask(TOTAL, PREFIX, tokens_per_step if block_causal else 1)
    )
    cos, sin = rotary()

    @jax.jit
    def run(params):
        expected, _ = model.apply({"params": params}, x, rotary(), mask)
        cache = [
            attention.empty_cache(2, TOTAL, CONFIG.num_heads, CONFIG.head_dim, jnp.float32)
        ] * CONFIG.num_layers
        angles = (cos[:PREFIX], sin[:PREFIX])
        visible = mask[:PREFIX, :PREFIX]
        first, cache = model.apply({"params": params}, x[:, :PREFIX], angles, visible, cache)

        def step(cache, start):
            now = functools.partial(
                jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=tokens_per_step
            )
            y, cache = model.apply(
                {"params": params}, now(x, axis=1), (now(cos), now(sin)), now(mask), cache, start
            )
            return cache, y

        _, rest = jax.lax.scan(step, cache, jnp.arange(PREFIX, TOTAL, tokens_per_step))
        return expected, jnp.concatenate([first, *rest], axis=1)

    expected, decoded = run(params)
    assert_close(decoded, expected, 1e-5)


@pytest.mark.parametrize(
    ("residual", "dtype"), [("float32", jnp.float32), ("compute", jnp.bfloat16)]
)
def test_bfloat16(params, x, unrolled, residual, dtype):
    model = BlockCausalTransformer(
        dataclasses.replace(CONFIG, residual_dtype=residual), dtype=jnp.bfloat16
    )
    y, _ = jax.jit(model.apply)(
        {"params": params}, x, rotary(), attention.block_causal_mask(TOTAL, PREFIX, 4)
    )
    assert y.dtype == dtype
    assert_close(y.astype(jnp.float32), unrolled[1], 0.05)


def test_a_float32_residual_stream_is_nearer_to_float32():
    """bfloat16 in 40 random layers: a bfloat16 residual stream is rounded in each of them."""
    config = TransformerConfig(num_layers=40, dim=64, num_heads=2)
    xy = (order.token_positions(4, 4, 2, "patch") + 1.5).astype(np.float32)
    angles = rope.rotary_angles_2d(xy, config.head_dim, config.rope_base)
    arguments = (jnp.cos(angles), jnp.sin(angles)), attention.block_causal_mask(16, 0, 4)
    x = jax.random.normal(jax.random.key(1), (4, 16, config.dim))
    params = random_params(BlockCausalTransformer(config, scan=True), x, *arguments)

    def hidden(residual, dtype):
        model = BlockCausalTransformer(
            dataclasses.replace(config, residual_dtype=residual), scan=True, dtype=dtype
        )
        return np.asarray(jax.jit(model.apply)({"params": params}, x, *arguments)[0], np.float64)

    exact = hidden("float32", jnp.float32)
    np.testing.assert_array_equal(hidden("compute", jnp.float32), exact)
    wide, narrow = (
        np.linalg.norm(hidden(residual, jnp.bfloat16) - exact)
        for residual in ("float32", "compute")
    )
    assert wide < 0.8 * narrow


def test_scanned_layers_refuse_a_cache(params, x):
    cache = [
        attention.empty_cache(2, TOTAL, CONFIG.num_heads, CONFIG.head_dim, jnp.float32)
    ] * CONFIG.num_layers
    mask = attention.block_causal_mask(TOTAL, PREFIX, 4)
    with pytest.raises(ValueError, match="unstack the parameters"):
        BlockCausalTransformer(CONFIG, scan=True).apply(
            {"params": stack(params)}, x, rotary(), mask, cache
        )
