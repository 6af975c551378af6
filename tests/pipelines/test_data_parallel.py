"""The parts of data-parallel sampling that need no sampler; whole runs on several devices and hosts are in test_npz.py."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from bitdance_jax import UserError
from bitdance_jax.config import SamplerConfig
from bitdance_jax.pipelines import class_conditional as pipeline
from bitdance_jax.pipelines.class_conditional import ClassConditionalPipeline, Tokenizer
from bitdance_jax.pipelines.data_parallel import DataParallelSampler, balanced_labels
from bitdance_jax.sampling.solvers import EulerMaruyama


@pytest.fixture
def model():
    """With a GAN decoder, whose noise tells the images' keys. Instead of sampling, it gives the bits of the label."""
    tokenizer = Tokenizer(
        tiny_models.GAN_TOKENIZER, tiny_models.tokenizer_params(tiny_models.GAN_TOKENIZER)
    )
    config = dataclasses.replace(tiny_models.MODEL, tokenizer=tiny_models.GAN_TOKENIZER)
    model = ClassConditionalPipeline(config, tiny_models.model_params(), tokenizer)
    model._sample = lambda params, labels, keys, scales, solver: codes(labels)
    return model


def codes(labels):
    """All tokens alike but one, because a code without any spread has no style."""
    bits = (labels[:, None] >> jnp.arange(8)) & 1
    grid = jnp.broadcast_to(bits[:, None, None], (len(labels), 8, 8, 8)).astype(jnp.int8)
    return (2 * grid - 1).at[:, 0, 0].multiply(-1)


def test_every_image_once_with_its_own_label_and_key(model, monkeypatch):
    """Images 4 to 17, three at a time, decoded two at a time: the last batch is short, and every decoding has a rest."""
    monkeypatch.setattr(pipeline, "CHUNK_PIXELS", 2 * 16 * 16)
    batches = list(DataParallelSampler(model, per_device=3).batches(seed=5, first=4, count=18))
    assert [len(batch) for batch in batches] == [3, 3, 3, 3, 2]
    expected = model.tokenizer.decode(
        np.asarray(codes(jnp.arange(4, 18) % 9)), seed=5, first_index=4
    )
    # Programs of different batch sizes round differently: by a level, if a value lies at the edge of two.
    assert np.abs(np.concatenate(batches).astype(int) - expected).max() <= 1
    assert len(np.unique(expected, axis=0)) == 14


def test_nothing_left_to_draw(model):
    assert list(DataParallelSampler(model, per_device=3).batches(seed=5, first=18, count=18)) == []


def test_the_next_batch_is_begun_before_one_is_handed_out(model, monkeypatch):
    begun = []
    start = DataParallelSampler._start_batch
    monkeypatch.setattr(
        DataParallelSampler,
        "_start_batch",
        lambda self, seed, row, sampler: begun.append(row) or start(self, seed, row, sampler),
    )
    seen = [
        list(begun)
        for _ in DataParallelSampler(model, per_device=3).batches(seed=5, first=0, count=9)
    ]
    assert seen == [[0, 3], [0, 3, 6], [0, 3, 6]]


def test_the_models_own_sampler_unless_told_otherwise(model):
    got = []
    model._sample = lambda params, labels, keys, scales, solver: got.append(solver) or codes(labels)
    other = SamplerConfig(head_steps=7, guidance_scale=2.0)
    stronger = dataclasses.replace(other, guidance_scale=3.0, guidance_schedule="constant")
    sampler = DataParallelSampler(model, per_device=2)
    for chosen in (None, other, stronger):
        list(sampler.batches(0, 0, 2, chosen))
    assert got == [EulerMaruyama(100), EulerMaruyama(7)]  # another scale is not traced again


def test_balanced_labels():
    labels = balanced_labels(0, 50_000, 1000)
    assert labels.dtype == np.int64 and (np.bincount(labels) == 50).all()
    np.testing.assert_array_equal(balanced_labels(7, 5, 9), [7, 8, 0, 1, 2])


def test_a_batch_that_cannot_be(model):
    with pytest.raises(UserError, match="batch_size must be positive, got 0"):
        DataParallelSampler(model, per_device=0)
