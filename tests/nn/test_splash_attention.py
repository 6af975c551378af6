"""Splash attention of packed documents, interpreted, against products in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pallas_on_cpu
import pytest

from bitdance_jax.nn import splash_attention
from bitdance_jax.nn.attention import attend
from bitdance_jax.nn.packed_attention import PackedMask


def packed(length: int, seed: int) -> PackedMask:
    """Documents of 30 to 90 tokens, each with a block of 16 that sees itself, then padding."""
    rng = np.random.default_rng(seed)
    documents = np.full((1, length), -1, np.int32)
    limits = np.arange(1, length + 1, dtype=np.int32)[None]
    start = 0
    while start < length - 90:
        end = start + int(rng.integers(30, 90))
        documents[0, start:end] = start
        block = int(rng.integers(start, end - 15))
        limits[0, block : block + 16] = block + 16
        start = end
    return PackedMask(documents, limits)


def test_blocks_that_are_skipped_see_nothing():
    mask = packed(length=1024, seed=0)
    documents, limits = (jnp.asarray(part[0]) for part in mask)
    blocks = splash_attention._visible_blocks(documents, limits, block=32)
    seen = np.asarray(mask.array()[0]).reshape(32, 32, 32, 32).any(axis=(1, 3))
    visible = np.asarray(blocks.visible[0], bool)
    np.testing.assert_array_equal(visible & seen, seen)
    assert visible.sum() < 1.5 * seen.sum() < 150
    # Nothing but visible blocks is read, and a visible one is read for itself.
    query, key = np.indices((32, 32))
    assert visible[query, blocks.next_keys[0]].all()
    assert visible[blocks.next_queries[0], key].all()
    np.testing.assert_array_equal(blocks.next_keys[0][visible], key[visible])
    np.testing.assert_array_equal(blocks.next_queries[0][visible], query[visible])


@pytest.mark.parametrize(
    ("length", "block"), [(90, 128), (1024, 1024), (1100, 640), (4096, 1024), (37_376, 1024)]
)
def test_blocks_leave_little_padding(length, block):
    assert splash_attention._block(length) == block


@pytest.mark.slow
def test_results_and_gradients_are_those_of_xla(monkeypatch):
    """Rows of several documents and blocks, grouped heads, a length that is padded."""
    pallas_on_cpu.interpret(monkeypatch)
    monkeypatch.setattr(splash_attention, "BLOCK", 128)
    rows = zip(packed(300, 0), packed(300, 1), strict=True)
    mask = PackedMask(*(np.concatenate(part) for part in rows))
    keys = jax.random.split(jax.random.key(0), 4)
    q, direction = (jax.random.normal(key, (2, 4, 300, 16)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, 2, 300, 16)) for key in keys[2:])

    def results(kernel):
        @jax.jit
        def run(q, k, v, direction):
            out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, mask, kernel), q, k, v)
            return out, *pull(direction)

        return run(q, k, v, direction)

    for fused, expected in zip(results("pallas"), results("xla"), strict=True):
        np.testing.assert_allclose(fused, expected, atol=1e-5)


def test_the_kernel_is_chosen_for_packed_documents(monkeypatch):
    """By `attend`, whose other kernels do not change."""
    calls = []
    monkeypatch.setattr(splash_attention, "attend_packed", lambda *a: calls.append(a) or a[0])
    x = jnp.zeros((1, 1, 64, 8))
    mask = packed(64, 0)
    attend(x, x, x, mask, "xla")
    assert not calls
    attend(x, x, x, mask, "pallas")
    assert calls
