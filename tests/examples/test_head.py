"""examples/head.py: it trains, samples what it has learned, and is found by its kind."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from example_files import load_example

from bitdance_jax import ClassConditionalPipeline, Tokenizer
from bitdance_jax.config import ClassConditionalConfig, ConfigError, HeadConfig, from_dict, to_dict
from bitdance_jax.heads.make import HEADS
from bitdance_jax.models import class_conditional
from bitdance_jax.models.class_conditional import ClassConditional


@pytest.fixture(scope="module")
def config():
    example = load_example("head")
    yield dataclasses.replace(tiny_models.MODEL, head=example.BrierHeadConfig(width=32))
    del HEADS[example.BrierHeadConfig], HeadConfig.kinds["brier"]


def test_it_learns_the_bits_of_two_classes(config):
    """All tokens of a class have the same bits, those of class 1 the opposite ones of class 0."""
    model = ClassConditional(config, scan=True)
    optimizer = optax.adam(1e-2)
    labels = jnp.array([0, 1] * 4)
    token = jnp.array([1.0, -1.0] * (config.tokenizer.bits // 2))
    codes = jnp.where(labels == 0, 1, -1)[:, None, None, None] * token
    codes = jnp.tile(codes, (1, config.grid, config.grid, 1))

    @jax.jit
    def step(carry, key):
        params, state = carry
        noise = class_conditional.training_noise(jax.random.split(key, len(labels)), config)
        loss = functools.partial(
            class_conditional.class_conditional_loss,
            model,
            labels=labels,
            codes=codes,
            noise=noise,
        )
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    params = class_conditional.init_params(model, jax.random.key(1))
    carry = params, optimizer.init(params)
    carry, losses = jax.lax.scan(step, carry, jax.random.split(jax.random.key(2), 60))
    assert losses[0] == pytest.approx(1.0, abs=0.5)
    assert losses[-1] < 0.2

    tokenizer = Tokenizer(config.tokenizer, tiny_models.tokenizer_params())
    model = ClassConditionalPipeline(config, carry[0], tokenizer)
    options = {"sampler": tiny_models.SAMPLER, "output": "codes", "progress": False}
    samples = model.sample(labels.tolist(), **options)
    assert np.mean(samples == codes) > 0.9


def test_config_file(config):
    """Its kind stands in config.json; a head without one is the binary diffusion head."""
    data = to_dict(config)
    assert data["head"] == {"kind": "brier", "width": 32}
    assert from_dict(ClassConditionalConfig, data) == config
    assert "kind" not in to_dict(tiny_models.MODEL)["head"]
    with pytest.raises(ConfigError, match=r"config\.head\.kind"):
        from_dict(ClassConditionalConfig, data | {"head": {"kind": "softmax"}})
