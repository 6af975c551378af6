"""Attention in chunks of queries against dense products, and the mask by brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitdance_jax.nn import packed_attention
from bitdance_jax.nn.attention import attend
from bitdance_jax.nn.packed_attention import PackedMask


def random_mask(length: int, seed: int) -> PackedMask:
    """Documents of 3 to 9 tokens, in each of which the last 4 are a block."""
    rng = np.random.default_rng(seed)
    documents = np.full(length, -1, np.int32)
    limits = np.arange(1, length + 1, dtype=np.int32)
    start = 0
    number = 0
    while start < length - 12:
        size = int(rng.integers(5, 10))
        documents[start : start + size] = number
        limits[start + size - 4 : start + size] = start + size
        start += size
        number += 1
    return PackedMask(documents[None], limits[None])


def test_the_mask_is_what_it_says():
    mask = random_mask(40, seed=0)
    documents, limits = (np.asarray(array)[0] for array in mask)
    expected = [
        [documents[query] == documents[key] and key < limits[query] for key in range(40)]
        for query in range(40)
    ]
    np.testing.assert_array_equal(mask.array()[0], expected)


@pytest.mark.parametrize("chunk", [8, 13, 256])
def test_chunks_do_not_matter(monkeypatch, chunk):
    """With grouped heads, and a length that chunks do not divide."""
    monkeypatch.setattr(packed_attention, "CHUNK", chunk)
    mask = PackedMask(
        *(np.concatenate(part) for part in zip(random_mask(45, 1), random_mask(45, 2), strict=True))
    )
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 4, 45, 8))
    k = jax.random.normal(keys[1], (2, 2, 45, 8))
    v = jax.random.normal(keys[2], (2, 2, 45, 8))

    def by_chunks(q, k, v):
        return attend(q, k, v, mask)

    def dense(q, k, v):
        return attend(q, k, v, mask.array())

    ours = jax.jit(by_chunks)(q, k, v)
    np.testing.assert_allclose(ours, dense(q, k, v), atol=1e-5)
    gradients = [
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1, 2)))(q, k, v)
        for f in (by_chunks, dense)
    ]
    for ours, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
