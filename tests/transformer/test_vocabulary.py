import jax
import ml_dtypes
import numpy as np
import pytest

from bitdance_jax.errors import UserError
from bitdance_jax.transformer import vocabulary


ROWS, DIM = 40, 6


def params(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    scales = np.arange(1, DIM + 1)
    return {
        "embed_tokens": {"embedding": (3 + rng.normal(size=(rows, DIM)) * scales)},
        "lm_head": {"kernel": (rng.normal(size=(rows, DIM)) * scales - 2).T},
        "norm": {"scale": np.ones(DIM)},
    }


def test_rows_are_normal_around_the_mean(monkeypatch):
    """With 1e-9 of the table's covariance, estimated from many rows; blocks change nothing."""
    table = params()["embed_tokens"]["embedding"].astype(np.float32)
    monkeypatch.setattr(vocabulary, "VARIANCE", 1.0)
    new = vocabulary.new_rows(table, ROWS + 10_000, jax.random.key(0))
    np.testing.assert_allclose(new.mean(axis=0), table.mean(axis=0), atol=0.2)
    expected = np.cov(table.T, bias=True)
    np.testing.assert_allclose(np.cov(new.T), expected, atol=0.03 * np.abs(expected).max())
    monkeypatch.setattr(vocabulary, "BLOCK", 7)
    blocks = vocabulary.new_rows(table, ROWS + 20, jax.random.key(0))
    np.testing.assert_allclose(blocks, new[:20], rtol=1e-5, atol=1e-5)

    monkeypatch.undo()
    tiny = vocabulary.new_rows(table, ROWS + 20, jax.random.key(0)) - table.mean(axis=0)
    scaled = (new[:20] - table.mean(axis=0)) * 1e-9**0.5
    np.testing.assert_allclose(tiny, scaled, atol=1e-6)


def test_old_rows_stay():
    old = params()
    old["embed_tokens"]["embedding"] = old["embed_tokens"]["embedding"].astype(ml_dtypes.bfloat16)
    key = jax.random.key(1)
    grown = vocabulary.grow(old, ROWS + 5, key)
    embedding, kernel = grown["embed_tokens"]["embedding"], grown["lm_head"]["kernel"]
    assert embedding.dtype == kernel.dtype == np.float32
    assert embedding.shape == (ROWS + 5, DIM) and kernel.shape == (DIM, ROWS + 5)
    np.testing.assert_array_equal(embedding[:ROWS], old["embed_tokens"]["embedding"])
    np.testing.assert_array_equal(kernel[:, :ROWS], old["lm_head"]["kernel"].astype(np.float32))
    np.testing.assert_allclose(
        kernel[:, ROWS:].T, [old["lm_head"]["kernel"].mean(axis=1)] * 5, 1e-3
    )
    assert len(np.unique(embedding[ROWS:], axis=0)) == 5
    assert grown["norm"] is old["norm"]

    fewer = vocabulary.grow(old, ROWS + 2, key)
    np.testing.assert_array_equal(fewer["embed_tokens"]["embedding"], embedding[: ROWS + 2])
    assert vocabulary.grow(old, ROWS, key) is old
    with pytest.raises(UserError, match="40 rows already"):
        vocabulary.grow(old, ROWS - 1, key)
