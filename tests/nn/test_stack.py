import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitdance_jax.nn.stack import remat_policy, stack, stacked_axes, unstack


def layer(value: float) -> dict:
    return {"dense": {"kernel": jnp.full((2, 3), value), "bias": jnp.full((3,), -value)}}


def group(value: float) -> dict:
    return {"ada_ln": layer(value), "blocks_0": layer(value + 1), "blocks_1": layer(value + 2)}


UNROLLED = {
    "norm": {"scale": jnp.ones(4)},
    "embedding": jnp.ones((2, 2)),
    # More than ten, whose names do not sort as numbers.
    "transformer": {f"layers_{i}": layer(100 + i) for i in range(12)},
    "head": {"groups_0": group(0), "groups_1": group(10)},
}


def test_stack():
    stacked = stack(UNROLLED)
    assert stacked.keys() == {"norm", "embedding", "transformer", "head"}
    np.testing.assert_array_equal(
        stacked["transformer"]["layers"]["dense"]["kernel"][:, 0, 0], 100 + np.arange(12)
    )
    blocks = stacked["head"]["groups"]["blocks"]["dense"]["bias"]
    np.testing.assert_array_equal(blocks[..., 0], [[-1, -2], [-11, -12]])
    np.testing.assert_array_equal(
        stacked["head"]["groups"]["ada_ln"]["dense"]["bias"][:, 0], [0, -10]
    )


def test_round_trip():
    back = unstack(stack(UNROLLED))
    assert jax.tree.structure(back) == jax.tree.structure(UNROLLED)
    jax.tree.map(np.testing.assert_array_equal, back, UNROLLED)


def test_stacked_axes():
    assert stacked_axes(("transformer", "layers", "mlp", "w1", "kernel")) == 1
    assert stacked_axes(("head", "groups", "blocks", "mlp", "w1", "kernel")) == 2
    assert stacked_axes(("head", "groups", "ada_ln", "kernel")) == 1
    assert stacked_axes(("connector", "w1", "kernel")) == 0


def test_unknown_policy():
    with pytest.raises(KeyError, match="everything"):
        remat_policy("everything")
