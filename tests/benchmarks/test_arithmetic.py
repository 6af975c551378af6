"""The counted arithmetic, on programs that can be counted by hand and on the released models' samplers."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from bitdance_jax.config import ClassConditionalConfig, SamplerConfig
from bitdance_jax.models.class_conditional import ClassConditional, abstract_params
from bitdance_jax.perf.flops import traced_flops
from bitdance_jax.pipelines.class_conditional import sample_labels
from bitdance_jax.sampling.next_patch import resolve


def load(name):
    spec = importlib.util.spec_from_file_location(
        name, Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


arithmetic = load("arithmetic")


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def count(function, *sizes):
    return traced_flops(function, *(shape(*size) for size in sizes))


def test_products():
    assert count(jnp.matmul, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert count(jnp.dot, (5,), (5,)) == 2 * 5
    assert count(jnp.matmul, (4, 3, 5), (4, 5, 7)) == 4 * 2 * 3 * 5 * 7
    assert count(lambda a, b: jnp.einsum("bij,bkij->bk", a, b), (2, 3, 5), (2, 7, 3, 5)) == 2 * (
        2 * 7
    ) * (3 * 5)


def test_only_products_count():
    assert count(lambda x: jnp.exp(x) + jnp.sum(x * x), (3, 5)) == 0


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 2)])
def test_convolutions(stride, groups):
    """Each output value takes a window of 3 x 3 x (6 / groups) inputs."""

    def convolve(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            [(1, 1)] * 2,
            dimension_numbers=numbers,
            feature_group_count=groups,
        )

    assert count(convolve, (2, 8, 8, 6), (3, 3, 6 // groups, 10)) == 2 * (
        2 * (8 // stride) ** 2 * 10
    ) * (9 * 6 // groups)


def test_loops_count_in_full():
    def nested(x, w):
        def outer(x, _):
            return jax.lax.scan(lambda y, _: (y @ w, None), x @ w, length=5)[0], None

        return jax.lax.scan(outer, x, length=4)[0]

    assert count(nested, (3, 7), (7, 7)) == 4 * (1 + 5) * 2 * 3 * 7 * 7


def test_inner_functions_count():
    product = jax.jit(jnp.matmul)
    checkpointed = jax.checkpoint(lambda a, b: product(a, b) + product(a, b))
    assert count(checkpointed, (3, 5), (5, 7)) == 2 * 2 * 3 * 5 * 7

    silu = count(lambda a, b: jax.nn.silu(a @ b), (3, 5), (5, 7))
    assert silu == 2 * 3 * 5 * 7


def test_gradients_count():
    """A product's gradient is two more."""
    assert (
        count(jax.grad(lambda a, b: jnp.sum((a @ b) ** 2), argnums=(0, 1)), (3, 5), (5, 7))
        == 3 * 2 * 3 * 5 * 7
    )


def test_the_dearer_branch_counts():
    def branches(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)

    assert count(branches, (3, 7), (7, 7)) == 2 * 2 * 3 * 7 * 7


def test_a_loop_of_unknown_length_is_an_error():
    def loop(x, w):
        return jax.lax.while_loop(lambda y: y[0, 0] > 0, lambda y: y @ w, x)

    with pytest.raises(ValueError, match="no trip count"):
        count(loop, (3, 7), (7, 7))


@pytest.mark.parametrize("name", ["b_16x", "b_4x", "b_1x"])
def test_the_sampler_does_hardly_more_than_it_must(name):
    """Full size, traced without making an array. What is over the minimum: attention reads the whole cache, masked."""
    config, batch = ClassConditionalConfig.imagenet(name), 2
    sampler = SamplerConfig(head_steps=10, guidance_scale=3.0)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    solver, scales = resolve(sampler, config.head.time_shift, config.num_steps)
    function = functools.partial(sample_labels, ClassConditional(config), solver=solver)
    traced = traced_flops(
        function, abstract_params(config, scan=False), shape(batch, dtype=jnp.int32), keys, scales
    )
    assert 1 <= traced / arithmetic.minimal_sampler_flops(config, sampler, batch) < 1.03


def test_the_minimum_follows_rows_and_steps():
    config = ClassConditionalConfig.imagenet("b_16x")

    def minimum(batch=4, **sampler):
        return arithmetic.minimal_sampler_flops(
            config, SamplerConfig(head_steps=10, **sampler), batch
        )

    assert minimum(batch=8) / minimum() == pytest.approx(2, rel=1e-3)
    assert minimum(guidance_scale=2.0) == minimum(batch=8)
    assert minimum(solver="euler") < minimum()
    one_evaluation = minimum() - minimum(solver="euler")
    assert arithmetic.minimal_sampler_flops(
        config, SamplerConfig(head_steps=11), 4
    ) == pytest.approx(minimum() + one_evaluation, rel=1e-9)
