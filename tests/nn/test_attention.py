import functools
from types import SimpleNamespace

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import assert_close

from bitdance_jax.errors import ConfigError
from bitdance_jax.nn import attention
from bitdance_jax.nn.packed_attention import PackedMask


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Softmax attention, one head after the other, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.empty_like(q)
    for image in range(q.shape[0]):
        for head in range(q.shape[1]):
            shared = head // (q.shape[1] // k.shape[1])
            scores = q[image, head] @ k[image, shared].T / np.sqrt(q.shape[-1])
            if mask is not None:
                scores = np.where(mask, scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[image, head] = weights / weights.sum(axis=-1, keepdims=True) @ v[image, shared]
    return out


def test_golden_mask():
    recorded = golden_models.read("pieces/pieces")["mask.block4_prefix3_total19"]
    np.testing.assert_array_equal(
        attention.block_causal_mask(total=19, prefix=3, block=4), recorded == 0
    )


@pytest.mark.parametrize(
    ("total", "prefix", "block"), [(10, 0, 4), (13, 5, 4), (9, 4, 1), (6, 6, 2)]
)
def test_mask_rule(total, prefix, block):
    """Causal, and all of the own block; tokens of the prefix form no blocks."""

    def visible(query, key):
        same_block = (
            min(query, key) >= prefix and (query - prefix) // block == (key - prefix) // block
        )
        return key <= query or same_block

    expected = [[visible(query, key) for key in range(total)] for query in range(total)]
    np.testing.assert_array_equal(attention.block_causal_mask(total, prefix, block), expected)


def test_blocks_of_one_are_causal():
    np.testing.assert_array_equal(
        attention.block_causal_mask(12, 3, 1), np.tril(np.ones((12, 12), bool))
    )


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_attend(key_heads, masked):
    keys = jax.random.split(jax.random.key(0), 3)
    q = 3 * jax.random.normal(keys[0], (2, 4, 5, 8))
    k, v = (jax.random.normal(key, (2, key_heads, 7, 8)) for key in keys[1:])
    mask = attention.block_causal_mask(7, 1, 3)[2:] if masked else None
    assert_close(attention.attend(q, k, v, mask), reference(q, k, v, mask), 1e-5)


def test_attend_with_a_mask_for_each_row():
    """As one row at a time; a query that sees nothing, as padding, gets the mean of the values."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 4, 5, 8))
    (k, v) = (jax.random.normal(key, (2, 2, 5, 8)) for key in keys[1:])
    mask = np.tril(np.ones((2, 5, 5), bool))
    mask[1, :, :2] = False
    out = attention.attend(q, k, v, mask)
    for row in range(2):
        one = slice(row, row + 1)
        assert_close(out[one, :, 2:], reference(q[one, :, 2:], k[one], v[one], mask[row, 2:]), 1e-5)
    assert_close(out[1, :, 0], np.repeat(v[1].mean(axis=1), 2, axis=0), 1e-5)


def test_attend_with_large_scores():
    """Scores far beyond exp's range, and a masked key with the largest of all."""
    q, k, v = (
        jax.random.normal(key, (1, 1, 3, 4)) for key in jax.random.split(jax.random.key(0), 3)
    )
    q = 1000 * q
    mask = np.tril(np.ones((3, 3), bool))
    assert_close(attention.attend(q, k, v, mask), reference(q, k, v, mask), 1e-5)


def test_attend_in_bfloat16_keeps_the_softmax_exact():
    q, k, v = (
        jax.random.normal(key, (1, 2, 64, 16), jnp.bfloat16)
        for key in jax.random.split(jax.random.key(0), 3)
    )
    out = attention.attend(q, k, v, None)
    assert out.dtype == jnp.bfloat16
    assert_close(out.astype(jnp.float32), reference(q, k, v, None), 0.02)


@pytest.mark.parametrize("block", [1, 4, None])
def test_rule_is_the_mask_that_it_stands_for(block):
    q, k, v = (
        jax.random.normal(key, (2, 2, 11, 8)) for key in jax.random.split(jax.random.key(0), 3)
    )
    rule = None if block is None else attention.BlockCausal(prefix=3, block=block)
    mask = None if block is None else attention.block_causal_mask(11, 3, block)
    assert_close(attention.attend(q, k, v, rule), reference(q, k, v, mask), 1e-5)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN is for CUDA GPUs")
@pytest.mark.parametrize("length", [64, 319])
@pytest.mark.parametrize("block", [1, 4, None])
def test_cudnn_is_xla(length, block):
    """Results and gradients in bfloat16: even and odd lengths, causal, block-causal, no mask."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, direction = (jax.random.normal(key, (2, 4, length, 64), jnp.bfloat16) for key in keys)
    mask = None if block is None else attention.BlockCausal(prefix=63, block=block)

    def both(kernel):
        attend = jax.jit(lambda q, k, v: attention.attend(q, k, v, mask, kernel))
        out, pull = jax.vjp(attend, q, k, v)
        return [out, *pull(direction)]

    for fused, plain in zip(both("cudnn"), both("xla"), strict=True):
        assert_close(fused.astype(jnp.float32), plain.astype(jnp.float32), 0.02)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN is for CUDA GPUs")
def test_cudnn_with_a_mask_for_each_row():
    """As in cached sampling: few queries, fewer key heads, positions that some rows do not see."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (3, 8, 4, 64), jnp.bfloat16)
    k, v = (jax.random.normal(key, (3, 2, 33, 64), jnp.bfloat16) for key in keys[1:])
    mask = jnp.arange(33) >= jnp.array([0, 5, 20])[:, None, None]
    mask = jnp.broadcast_to(mask, (3, 4, 33))
    fused, plain = (attention.attend(q, k, v, mask, kernel) for kernel in ("cudnn", "xla"))
    assert_close(fused.astype(jnp.float32), plain.astype(jnp.float32), 0.02)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN is for CUDA GPUs")
def test_cudnn_of_packed_documents():
    """Results and gradients, with padding at the end of a row."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, direction = (jax.random.normal(key, (2, 6, 81, 32), jnp.bfloat16) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, 2, 81, 32), jnp.bfloat16) for key in keys[2:])
    documents = np.where(np.arange(81) < np.array([[81], [60]]), np.arange(81) // 30, -1)
    limits = np.broadcast_to(np.arange(81) // 5 * 5 + 5, documents.shape)
    mask = PackedMask(documents.astype(np.int32), limits.astype(np.int32))

    def both(kernel):
        attend = jax.jit(lambda q, k, v: attention.attend(q, k, v, mask, kernel))
        out, pull = jax.vjp(attend, q, k, v)
        return [out, *pull(direction)]

    for fused, plain in zip(both("cudnn"), both("xla"), strict=True):
        assert_close(fused.astype(jnp.float32), plain.astype(jnp.float32), 0.02)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN is for CUDA GPUs")
@pytest.mark.parametrize("padded", [False, True])
def test_cudnn_through_a_cache(padded):
    """It reads the filled positions, whatever is in the others."""
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, 8, 16, 64), jnp.bfloat16)
    k, v = jax.random.normal(keys[1], (2, 2, 2, 16, 64), jnp.bfloat16)
    cache = attention.KVCache(*jax.random.normal(keys[2], (2, 2, 2, 128, 64), jnp.bfloat16))
    mask = jnp.broadcast_to(jnp.arange(128) < 56, (2, 16, 128))
    if padded:
        mask &= jnp.arange(128) >= jnp.array([0, 9])[:, None, None]
    attend = jax.jit(attention.attend_through_cache, static_argnames="kernel")
    fused, plain = (
        attend(q, k, v, mask, cache=cache, start=jnp.int32(40), kernel=kernel)[0]
        for kernel in ("cudnn", "xla")
    )
    assert_close(fused.astype(jnp.float32), plain.astype(jnp.float32), 0.02)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="of devices without cuDNN")
def test_sampling_kernel_without_cudnn():
    kernel = attention.choose_sampling_kernel(jnp.bfloat16, block=16, head_dim=64)
    assert kernel == "xla"


def device(platform: str, **attributes) -> SimpleNamespace:
    return SimpleNamespace(platform=platform, **attributes)


def test_kernel_of_a_device():
    """Pallas' on TPUs in training; a cache is read by XLA's there."""
    tpu = device("tpu")
    assert attention.choose_kernel("auto", jnp.bfloat16, tpu) == "pallas"
    assert attention.choose_kernel("auto", jnp.float32, tpu) == "xla"
    assert attention.choose_kernel("xla", jnp.bfloat16, tpu) == "xla"
    assert attention.choose_kernel("auto", jnp.bfloat16, device("cpu")) == "xla"
    sampling = functools.partial(attention.choose_sampling_kernel, jnp.bfloat16, head_dim=64)
    assert sampling(block=16, device=tpu) == "xla"
    assert sampling(block=1, device=tpu) == "mxu"
    assert sampling(block=1, device=device("cpu")) == "xla"


@pytest.mark.parametrize(
    ("kernel", "platform", "needed"), [("pallas", "cpu", "TPU"), ("cudnn", "tpu", "GPU")]
)
def test_a_kernel_of_other_devices_is_an_error(kernel, platform, needed):
    with pytest.raises(ConfigError, match=f"attention {kernel} needs a {needed}"):
        attention.check_kernel(kernel, device(platform))
    attention.check_kernel(kernel, device(needed.lower()))
    attention.check_kernel("auto", device(platform))


def test_queries_are_padded_for_matrix_units():
    """One query of grouped heads through a cache, of which a part is filled."""
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, 6, 1, 8))
    k, v = jax.random.normal(keys[1], (2, 2, 3, 1, 8))
    cache = attention.KVCache(*jax.random.normal(keys[2], (2, 2, 3, 12, 8)))
    mask = (jnp.arange(12) < 6)[None]
    results = [
        attention.attend_through_cache(q, k, v, mask, kernel, cache, 5)[0]
        for kernel in ("mxu", "xla")
    ]
    assert_close(*results, 1e-6)


def test_write_cache():
    cache = attention.empty_cache(2, 6, num_heads=3, head_dim=4, dtype=jnp.bfloat16)
    assert cache.k.shape == cache.v.shape == (2, 3, 6, 4)
    k, v = jax.random.normal(jax.random.key(0), (2, 2, 3, 2, 4))
    cache = attention.write_cache(cache, k, v, jnp.int32(3))
    for entry, written in zip(cache, (k, v), strict=True):
        assert entry.dtype == jnp.bfloat16
        np.testing.assert_array_equal(entry[:, :, 3:5], written.astype(jnp.bfloat16))
        assert not np.any(entry[:, :, [0, 1, 2, 5]])
