"""The bit-wise and the token classification head against brute force over all codes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from random_params import random_params

from bitdance_jax.config import (
    BitwiseHeadConfig,
    ClassConditionalConfig,
    ConfigError,
    FlowHeadConfig,
    TokenClassificationHeadConfig,
    from_dict,
    to_dict,
)
from bitdance_jax.heads import token_classification
from bitdance_jax.heads.bitwise import logistic
from bitdance_jax.heads.make import make_head
from bitdance_jax.sampling.guidance import PatchGuidance
from bitdance_jax.sampling.solvers import make_solver
from bitdance_jax.tokenizer import lfq


BITS = 4
CODES = np.asarray(lfq.indices_to_codes(jnp.arange(2**BITS)[:, None], BITS))
"""All codes by their index."""

HEADS = {
    "bitwise": BitwiseHeadConfig(width=16),
    "token": TokenClassificationHeadConfig(width=16),
    "groups": TokenClassificationHeadConfig(width=16, groups=2),
}


def head_and_params(name, tokens_per_step=4):
    head = make_head(HEADS[name], bits=BITS, tokens_per_step=tokens_per_step)
    states = jax.random.normal(jax.random.key(0), (3, 2, tokens_per_step, 8))
    bits = jnp.zeros((3, 2, tokens_per_step, BITS))
    init = functools.partial(type(head).loss, noise=())
    params = random_params(head, states, bits, method=init)
    return head, params, states


def log_probabilities(head, params, states) -> np.ndarray:
    """Of all codes [..., 2^K], in float64, from the head's own outputs."""
    if isinstance(head.config, BitwiseHeadConfig):
        odds = np.float64(head.apply({"params": params}, states, method="log_odds"))
        return -np.logaddexp(0, -odds[..., None, :] * CODES).sum(axis=-1)
    logits = np.float64(head.apply({"params": params}, states, method="logits"))
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    groups = head.config.groups
    indices = np.asarray(lfq.codes_to_indices(jnp.asarray(CODES), groups))
    return sum(logits[..., g, :][..., indices[:, g]] for g in range(groups))


@pytest.mark.parametrize("name", HEADS)
def test_loss_is_the_cross_entropy_for_each_bit(name, monkeypatch):
    head, params, states = head_and_params(name)
    index = jax.random.randint(jax.random.key(1), states.shape[:3], 0, 2**BITS)
    bits = jnp.asarray(CODES)[index]
    expected = np.take_along_axis(
        log_probabilities(head, params, states), np.asarray(index)[..., None], axis=-1
    )

    def loss(params):
        return head.apply({"params": params}, states, bits, (), method="loss")

    def total(params):
        return jnp.mean(loss(params))

    np.testing.assert_allclose(loss(params), -expected[..., 0] / BITS, rtol=2e-5)
    gradient = jax.jit(jax.grad(total))(params)
    # The same in two parts.
    monkeypatch.setattr(token_classification, "LOGITS_AT_ONCE", 3 * 4 * 2**BITS)
    np.testing.assert_allclose(loss(params), -expected[..., 0] / BITS, rtol=2e-5)
    in_parts = jax.jit(jax.grad(lambda params: total(params)))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), in_parts, gradient)


@pytest.mark.parametrize("name", HEADS)
def test_samples_have_the_probabilities_of_the_guided_softmax(name):
    """Of 2^12 samples of one conditional and one unconditional state, guided by 2."""
    head, params, _ = head_and_params(name, tokens_per_step=1)
    rows = 2**12
    pair = jax.random.normal(jax.random.key(2), (2, 1, 8))
    states = jnp.repeat(pair, rows, axis=0)
    half = jax.random.normal(jax.random.key(3), (1, rows, 1, BITS))
    noise = jnp.concatenate([half, half], axis=1)
    solver = make_solver(tiny_models.SAMPLER, HEADS[name].time_shift)
    assert (solver.num_evaluations, solver.num_noises) == (1, 1)

    @jax.jit
    def sample(scale, separate):
        guide = PatchGuidance(scale[None], separate)
        return apply(states, noise, guide=guide)

    def apply(states, noise, guide):
        options = {"solver": solver, "guide": guide, "method": "sample"}
        return head.apply({"params": params}, states, noise, None, **options)

    def frequencies(values):
        index = lfq.codes_to_indices(lfq.quantize(values[:, 0]), 1)[:, 0]
        return np.bincount(np.asarray(index), minlength=2**BITS) / len(index)

    logs = log_probabilities(head, params, pair)[:, 0]
    # Five standard deviations of a count.
    options = {"rtol": 0, "atol": 5 * 0.5 / rows**0.5}
    guided = np.exp(logs[1] + 2 * (logs[0] - logs[1]))
    shared = sample(jnp.float32(2), jnp.bool_(False))
    np.testing.assert_array_equal(shared[:rows], shared[rows:])
    np.testing.assert_allclose(frequencies(shared[:rows]), guided / guided.sum(), **options)
    # Without guidance, and at scale 1 with shared samples, that of the conditional rows.
    plain = jax.jit(functools.partial(apply, guide=None))(states[:rows], noise[:, :rows])
    np.testing.assert_allclose(frequencies(plain), np.exp(logs[0]), **options)
    one = sample(jnp.float32(1), jnp.bool_(False))
    assert np.mean(lfq.quantize(one[:rows]) == lfq.quantize(plain)) > 0.999
    # Separate streams: each by itself.
    separate = sample(jnp.float32(1), jnp.bool_(True))
    np.testing.assert_allclose(frequencies(separate[rows:]), np.exp(logs[1]), **options)


def test_one_code_of_many_is_as_likely_as_its_softmax_says():
    """One of 2^10 codes has half of the probability."""
    logits = jnp.zeros((1024, 2**10)).at[:, 77].set(np.log(2**10 - 1))
    normal = jax.random.normal(jax.random.key(0), (1024, 10))
    values = jax.jit(token_classification.sample_codes)(logits, logistic(normal))
    index = np.asarray(lfq.codes_to_indices(lfq.quantize(values), 1))[:, 0]
    assert np.mean(index == 77) == pytest.approx(0.5, abs=0.08)
    others = index[index != 77]
    assert np.mean(others) == pytest.approx(512, abs=5 * 1024 / (12 * len(others)) ** 0.5)
    assert len(np.unique(others)) == pytest.approx(
        1023 * (1 - np.exp(-len(others) / 1023)), rel=0.1
    )


def test_a_softmax_that_cannot_fit_is_refused():
    b_1x = ClassConditionalConfig.imagenet("b_1x")
    head = TokenClassificationHeadConfig(width=768)
    with pytest.raises(ConfigError, match=r"2\^32 logits.*16 GiB.*12,288 GiB.*head\.groups"):
        dataclasses.replace(b_1x, head=head)
    with pytest.raises(ConfigError, match=r"groups must divide the tokenizer's bits, got 3 and 32"):
        dataclasses.replace(b_1x, head=dataclasses.replace(head, groups=3))
    fits = dataclasses.replace(b_1x, head=dataclasses.replace(head, groups=2))
    data = to_dict(fits)
    assert data["head"] == {"kind": "token_classification", "width": 768, "groups": 2}
    assert from_dict(ClassConditionalConfig, data) == fits


def test_continuous_latents_have_the_diffusion_head_alone():
    for head in HEADS.values():
        with pytest.raises(ConfigError, match="continuous; take the binary diffusion head"):
            head.check_latents(16, "continuous")
    flow = FlowHeadConfig(width=64, num_blocks=1, num_groups=1)
    flow.check_latents(16, "continuous")
    with pytest.raises(ConfigError, match="squash_output"):
        dataclasses.replace(flow, squash_output=True).check_latents(16, "continuous")
