import dataclasses
import functools

import compiling
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from golden_models import assert_close
from random_params import random_params

from bitdance_jax.config import FlowHeadConfig
from bitdance_jax.heads import binary_diffusion, dit
from bitdance_jax.heads.binary_diffusion import FlowHead
from bitdance_jax.heads.dit import timestep_features
from bitdance_jax.nn.stack import stack, unstack
from bitdance_jax.sampling.solvers import Euler


CONFIG = FlowHeadConfig(width=32, num_blocks=4, num_groups=2, head_dim=8)
BITS = 6
CONDITION = 20


def inputs(tokens_per_step: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    x_t = jax.random.normal(keys[0], (5, tokens_per_step, BITS))
    z = jax.random.normal(keys[1], (5, tokens_per_step, CONDITION))
    return x_t, jax.random.uniform(keys[2], (5,)), z


def head(tokens_per_step: int, scan: bool = False, **fields) -> FlowHead:
    return FlowHead(dataclasses.replace(CONFIG, **fields), BITS, tokens_per_step, scan)


def test_timestep_features():
    pieces = golden_models.read("pieces/pieces")
    features = timestep_features(jnp.asarray(pieces["timestep_embedding.t"]))
    # At t = 1 the angles reach 1000 rad, whose last float32 digit is 6e-5.
    np.testing.assert_allclose(features, pieces["timestep_embedding.out"], atol=5e-5)


@compiling.optimized()
@pytest.mark.parametrize("name", ["imagenet_1x", "imagenet_4x", "imagenet_16x"])
def test_golden_prediction(name, monkeypatch):
    config, params, _ = golden_models.class_conditional(name)
    golden = golden_models.read(f"{name}/train")
    patches = (len(golden["t"]), config.tokens_per_step, -1)
    condition = np.tile(
        golden["hidden"] + params["position_embedding"], (config.head_repeats, 1, 1)
    )
    monkeypatch.setattr(dit, "timestep_features", rounding.recorded_time_features)
    model = FlowHead(config.head, config.tokenizer.bits, config.tokens_per_step)
    t = jnp.asarray(golden["t"])

    def predict(numbers):
        return model.apply({"params": numbers["params"]}, numbers["x_t"], t, numbers["condition"])

    numbers = {
        "params": params["head"],
        "x_t": golden["x_t"].reshape(patches),
        "condition": condition.reshape(patches),
    }
    exact = rounding.in_float64(predict)(numbers)
    others = rounding.other_runs(predict, numbers)
    assert rounding.bound(exact, others) < 1e-2
    for prediction in (jax.jit(predict)(numbers), golden["x_pred"].reshape(patches)):
        rounding.assert_rounded(prediction, exact, others)


@pytest.mark.parametrize("tokens_per_step", [1, 4])
def test_scanned_blocks_give_the_same_numbers(tokens_per_step):
    arguments = inputs(tokens_per_step)
    params = random_params(head(tokens_per_step), *arguments)

    def value_and_gradient(model, params):
        def loss(params):
            prediction = model.apply({"params": params}, *arguments)
            return jnp.sum(
                prediction * jnp.cos(jnp.arange(prediction.size)).reshape(prediction.shape)
            ), prediction

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    expected_gradient, expected = value_and_gradient(head(tokens_per_step), params)
    gradient, prediction = value_and_gradient(head(tokens_per_step, scan=True), stack(params))
    assert_close(prediction, expected, 1e-5)
    jax.tree.map(assert_close, unstack(gradient), expected_gradient)


def test_prepared_predictions_equal_the_call(monkeypatch):
    """With modulation for one evaluation or for all; one time for all rows."""
    x_t, _, z = inputs(4)
    model = head(4)
    variables = {"params": random_params(model, x_t, jnp.zeros(5), z)}
    times = jnp.array([0.2, 0.7])
    solver = Euler(1)
    monkeypatch.setattr(Euler, "times", lambda self: times)
    time_vectors = model.apply(variables, solver, method="prepare")
    for at_once in (False, True):
        monkeypatch.setattr(
            binary_diffusion, "modulated_at_once", lambda *_, at_once=at_once: at_once
        )
        prepared = model.apply(variables, z, time_vectors, method="prepare_patch")
        for i, t in enumerate(times):
            expected = model.apply(variables, x_t, jnp.full(5, t), z)
            assert_close(model.apply(variables, x_t, prepared, i, method="predict"), expected, 1e-5)


def test_tokens_of_a_patch_see_each_other_and_no_other_patch():
    arguments = inputs(4)
    model = head(4)
    predict = jax.jit(functools.partial(model.apply, {"params": random_params(model, *arguments)}))
    x_t, t, z = arguments
    changed = np.abs(predict(x_t.at[1, 2].add(1.0), t, z) - predict(x_t, t, z)).max(axis=-1) > 1e-5
    np.testing.assert_array_equal(changed, np.arange(5)[:, None] == np.full((1, 4), 1))


def test_squashed_output():
    arguments = inputs(4)
    variables = {"params": random_params(head(4), *arguments)}
    plain, squashed = (
        jax.jit(head(4, squash_output=squash).apply)(variables, *arguments)
        for squash in (False, True)
    )
    np.testing.assert_allclose(
        squashed, 2 / (1 + np.exp(-np.asarray(plain, np.float64))) - 1, atol=1e-5
    )


def test_without_swiglu():
    """One MLP block by hand: LayerNorm, scale and shift, Linear, silu, Linear, gate."""
    model = head(1, use_swiglu=False, num_blocks=1, num_groups=1)
    x_t, t, z = inputs(1)
    params = random_params(model, x_t, t, z)
    prediction = jax.jit(model.apply)({"params": params}, x_t, t, z)

    def linear(x, layer):
        return np.tensordot(x, layer["kernel"], 1) + layer["bias"]

    def norm(x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)

    def silu(x):
        return x / (1 + np.exp(-x))

    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    time = linear(
        silu(linear(np.asarray(timestep_features(t)), params["time_embed"]["fc1"])),
        params["time_embed"]["fc2"],
    )
    y = silu(time[:, None] + linear(np.asarray(z), params["cond_embed"]))
    x = linear(np.asarray(x_t), params["input_proj"])
    group = params["groups_0"]
    block = params["groups_0"]["blocks_0"]
    assert block["mlp"]["fc1"]["kernel"].shape == (32, 48)
    scale, shift, gate = np.moveaxis(linear(y, group["ada_ln"]), -2, 0)
    normed = norm(x) * block["mlp_norm"]["scale"] + block["mlp_norm"]["bias"]
    x = x + gate * linear(
        silu(linear(normed * (1 + scale) + shift, block["mlp"]["fc1"])), block["mlp"]["fc2"]
    )
    scale, shift = np.moveaxis(linear(y, params["final_ada_ln"]), -2, 0)
    assert_close(prediction, linear(norm(x) * (1 + scale) + shift, params["final_linear"]), 1e-5)


def test_bfloat16_predicts_in_float32():
    arguments = inputs(4)
    variables = {"params": random_params(head(4), *arguments)}
    exact = jax.jit(head(4).apply)(variables, *arguments)
    low = jax.jit(FlowHead(CONFIG, BITS, 4, dtype=jnp.bfloat16).apply)(variables, *arguments)
    assert low.dtype == jnp.float32
    assert_close(low, exact, 0.05)
