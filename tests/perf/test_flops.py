"""The operations counted in a traced program, on programs that can be counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from bitdance_jax.perf.flops import traced_flops


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def count(function, *sizes):
    return traced_flops(function, *(shape(*size) for size in sizes))


def test_products():
    assert count(jnp.matmul, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert count(jnp.dot, (5,), (5,)) == 2 * 5
    assert count(jnp.matmul, (4, 3, 5), (4, 5, 7)) == 4 * 2 * 3 * 5 * 7
    batched = count(lambda a, b: jnp.einsum("bij,bkij->bk", a, b), (2, 3, 5), (2, 7, 3, 5))
    assert batched == 2 * (2 * 7) * (3 * 5)


def test_only_products_count():
    assert count(lambda x: jnp.exp(x) + jnp.sum(x * x), (3, 5)) == 0


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 2)])
def test_convolutions(stride, groups):
    """Each output is the sum of a window of 3 x 3 x (6 / groups) inputs."""

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

    outputs = 2 * (8 // stride) ** 2 * 10
    flops = count(convolve, (2, 8, 8, 6), (3, 3, 6 // groups, 10))
    assert flops == 2 * outputs * (9 * 6 // groups)


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
    """The gradient of a product takes two more."""
    gradient = jax.grad(lambda a, b: jnp.sum((a @ b) ** 2), argnums=(0, 1))
    assert count(gradient, (3, 5), (5, 7)) == 3 * 2 * 3 * 5 * 7


def test_the_more_expensive_branch_counts():
    def branches(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)

    assert count(branches, (3, 7), (7, 7)) == 2 * 2 * 3 * 7 * 7


def test_a_loop_of_unknown_length_is_an_error():
    def loop(x, w):
        return jax.lax.while_loop(lambda y: y[0, 0] > 0, lambda y: y @ w, x)

    with pytest.raises(ValueError, match="while loop"):
        count(loop, (3, 7), (7, 7))
