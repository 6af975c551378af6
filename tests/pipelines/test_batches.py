"""Sampling batch by batch; on several devices and hosts in test_npz.py."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from same_images import assert_same_images

from bitdance_jax import ClassConditionalPipeline, Tokenizer, UserError
from bitdance_jax.config import SamplerConfig
from bitdance_jax.pipelines import tokenizer as tokenizer_module
from bitdance_jax.pipelines.npz import balanced_labels
from bitdance_jax.sampling import next_patch
from bitdance_jax.sampling.multistep import Multistep
from bitdance_jax.sampling.solvers import EulerMaruyama


@pytest.fixture
def solvers(monkeypatch):
    """The solvers that the sampler, here a quick one, is traced for. Its bits are the label's."""
    solvers = []

    def quick(model, state, stop, *, solver, **options):
        solvers.append(solver)
        labels = jnp.asarray(model.labels)[: state.values.shape[1]]
        return state._replace(values=values(labels), patch=stop)

    monkeypatch.setattr(next_patch, "advance", quick)
    return solvers


def values(labels):
    """All tokens alike but one, because a code without any spread has no style."""
    bits = ((labels[:, None] >> jnp.arange(8)) & 1).astype(jnp.float32)
    tokens = jnp.broadcast_to(2 * bits - 1, (16, 4, len(labels), 8)).swapaxes(1, 2)
    return tokens.at[0, :, 0].multiply(-1)


@pytest.fixture
def model(solvers, monkeypatch):
    """With a GAN decoder, whose noise depends on the images' keys."""
    params = tiny_models.tokenizer_params(tiny_models.GAN_TOKENIZER)
    tokenizer = Tokenizer(tiny_models.GAN_TOKENIZER, params)
    config = dataclasses.replace(tiny_models.MODEL, tokenizer=tiny_models.GAN_TOKENIZER)
    from bitdance_jax.models.class_conditional import PatchReader

    build = PatchReader.__init__

    def remember(self, model, params, labels):
        build(self, model, params, labels)
        self.labels = labels

    monkeypatch.setattr(PatchReader, "__init__", remember)
    return ClassConditionalPipeline(config, tiny_models.model_params(), tokenizer)


def test_every_image_once_with_its_own_label_and_key(model, monkeypatch):
    """Images 4 to 17, three at a time, decoded two at a time: the last batch is short."""
    monkeypatch.setattr(tokenizer_module, "CHUNK_PIXELS", 2 * 16 * 16)
    labels = balanced_labels(4, 14, 9)
    batches = list(model.batches(labels, seed=5, first_index=4, batch_size=3))
    assert [len(batch) for batch in batches] == [3, 3, 3, 3, 2]
    codes = np.asarray(
        model._execution.programs.to_codes(values(jnp.asarray(labels)), 16, height=8)
    )
    expected = model.tokenizer.decode(codes, seed=5, first_index=4)
    assert_same_images(np.concatenate(batches), expected)
    assert len(np.unique(expected, axis=0)) == 14


def test_no_images(model):
    assert list(model.batches([], seed=5)) == []


def test_the_next_batch_is_dispatched_before_one_is_returned(model, monkeypatch):
    started = []
    start = model._execution._start_batch

    def record(params, request, row):
        started.append(row)
        return start(params, request, row)

    monkeypatch.setattr(model._execution, "_start_batch", record)
    seen = [list(started) for _ in model.batches([0] * 9, batch_size=3)]
    assert seen == [[0, 3], [0, 3, 6], [0, 3, 6]]


def test_the_models_own_sampler_is_the_default(model, solvers):
    other = SamplerConfig(head_steps=7, guidance_scale=2.0)
    stronger = dataclasses.replace(other, guidance_scale=3.0, guidance_schedule="constant")
    for chosen in (None, other, stronger, "fast"):
        list(model.batches([0, 1], sampler=chosen, batch_size=2))
    # Another scale is not traced again.
    assert solvers == [EulerMaruyama(100), EulerMaruyama(7), Multistep(12)]


def test_balanced_labels():
    labels = balanced_labels(0, 50_000, 1000)
    assert labels.dtype == np.int64 and (np.bincount(labels) == 50).all()
    np.testing.assert_array_equal(balanced_labels(7, 5, 9), [7, 8, 0, 1, 2])


def test_a_batch_size_that_cannot_be(model):
    with pytest.raises(UserError, match="batch_size must be positive, got 0"):
        next(model.batches([0], batch_size=0))
