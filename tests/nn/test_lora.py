import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from golden_models import assert_close
from random_params import random_params

from bitdance_jax.config import Qwen3Config
from bitdance_jax.nn import linear, lora
from bitdance_jax.nn.layers import FusedDense
from bitdance_jax.nn.quantize import FORMATS, quantize
from bitdance_jax.nn.stack import stacked_axes, unstack
from bitdance_jax.transformer.qwen3 import Qwen3


CONFIG = Qwen3Config(
    num_layers=2, dim=16, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=11
)
TOKENS = jnp.arange(5)[None]
RANK = 3
SCALE = 0.5


def test_by_hand():
    """x W = (4, 6), x A = 3, 3 B = (3, -3)."""
    params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    adapters = {lora.A: jnp.array([[1.0], [2.0]]), lora.B: jnp.array([[1.0, -1.0]])}
    both = lora.attached(params, adapters, SCALE)
    dense = linear.Dense(2, use_bias=False, dtype=jnp.float32)
    y = dense.apply({"params": both}, jnp.array([1.0, 1.0]))
    np.testing.assert_array_equal(y, [5.5, 4.5])
    kernel = lora.merged(params["kernel"], adapters[lora.A], adapters[lora.B], SCALE)
    np.testing.assert_array_equal(kernel, [[1.5, 1.5], [4.0, 3.0]])


@functools.partial(jax.jit, static_argnames="scan")
def logits(params, scan):
    model = Qwen3(CONFIG, scan=scan)
    return model.apply({"params": params}, TOKENS, method="next_token_logits")


@pytest.fixture(scope="module")
def toy():
    """Stacked parameters, and new adapters of every linear layer."""
    params = random_params(Qwen3(CONFIG, scan=True), TOKENS, method="next_token_logits")
    flat = traverse_util.flatten_dict(params)
    kernels = {path: x.shape for path, x in flat.items() if path[-1] == "kernel"}
    return params, lora.initial(kernels, RANK, jax.random.key(2))


@pytest.mark.slow
def test_new_adapters_change_nothing_but_learn(toy):
    params, adapters = toy

    def mean(adapters):
        values = logits(lora.attached(params, adapters, SCALE), scan=True)
        return jnp.mean(values**2), values

    gradients, values = jax.grad(mean, has_aux=True)(adapters)
    np.testing.assert_allclose(values, logits(params, scan=True), rtol=1e-6)
    for path, gradient in traverse_util.flatten_dict(gradients).items():
        assert bool(jnp.all(jnp.any(gradient != 0, axis=(-2, -1)))) == (path[-1] == lora.B), path
    a = adapters["layers"]["mlp"]["down"][lora.A]
    assert a.shape == (2, CONFIG.hidden_dim, RANK)
    limit = CONFIG.hidden_dim**-0.5
    assert limit * 0.9 < jnp.abs(a).max() <= limit


def test_applied_equals_merged(toy):
    params, adapters = toy
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape), adapters)
    flat, low_rank = (traverse_util.flatten_dict(tree) for tree in (params, adapters))
    for path, kernel in flat.items():
        if path[-1] == "kernel":
            merge = functools.partial(lora.merged, scale=SCALE)
            merge = jax.vmap(merge) if stacked_axes(path) else merge
            flat[path] = merge(kernel, *(low_rank[*path[:-1], name] for name in (lora.A, lora.B)))
    merged = traverse_util.unflatten_dict(flat)
    both = lora.attached(params, adapters, SCALE)
    expected = logits(merged, scan=True)
    assert_close(logits(both, scan=True), expected, 1e-5)
    assert_close(logits(unstack(both), scan=False), expected, 1e-5)
    assert jnp.abs(logits(params, scan=True) - expected).max() > 0.1


def test_fused_and_int8_kernels():
    rng = np.random.default_rng(0)
    sizes = ((6, 2, 5), (6, RANK), (RANK, 2, 5), (4, 6))
    kernel, a, b, x = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes)
    dense = FusedDense(2, 5, use_bias=False)
    for stored in (kernel, quantize(kernel, FORMATS["int8"])):
        plain = dense.apply({"params": {"kernel": stored}}, x)
        both = dense.apply({"params": {"kernel": stored, lora.A: a, lora.B: b}}, x)
        change = jnp.moveaxis(jnp.stack(both) - jnp.stack(plain), 0, 1)
        assert_close(change, jnp.tensordot(x @ a, b, axes=1), 1e-5)
    assert_close(lora.merged(kernel, a, b, 1.0) - kernel, jnp.tensordot(a, b, axes=1), 1e-5)
