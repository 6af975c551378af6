import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitdance_jax.convert.keys import pairs_to_halves
from bitdance_jax.nn import rope
from bitdance_jax.transformer import order


PREFIX = 5
HEAD_DIM = 64


@pytest.fixture(scope="module")
def pieces() -> dict[str, np.ndarray]:
    return golden_models.read("pieces/pieces")


def angles(patch_side: int) -> np.ndarray:
    """Of an unrotated prefix and an 8 x 8 grid, as recorded."""
    xy = (order.token_positions(8, 8, patch_side, "patch") + 1.5).astype(np.float32)
    return np.concatenate(
        [
            np.zeros((PREFIX, HEAD_DIM // 2), np.float32),
            rope.rotary_angles_2d(xy, HEAD_DIM, 10000.0),
        ]
    )


@pytest.mark.parametrize(("name", "patch_side"), [("rope.cos_sin", 1), ("rope.cos_sin_patch4", 2)])
def test_tables(pieces, name, patch_side):
    tables = np.stack([np.cos(angles(patch_side)), np.sin(angles(patch_side))], axis=-1)
    np.testing.assert_allclose(tables, pieces[name], atol=1e-6)


def test_rotation(pieces):
    """The release turns pairs of neighbours; in our order of dimensions it is the same rotation."""
    x, expected = (
        jnp.asarray(pairs_to_halves(pieces[name])).swapaxes(1, 2)
        for name in ("rope.in", "rope.out")
    )
    rotated = rope.rotate(x, jnp.cos(angles(1)), jnp.sin(angles(1)))
    golden_models.assert_close(rotated, expected, 1e-6)
    assert (
        golden_models.largest_error(
            rope.rotate(x, jnp.cos(angles(2)), jnp.sin(angles(2))), expected
        )
        > 0.1
    )


def test_products_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, HEAD_DIM))

    def product(query_xy, key_xy):
        turned = []
        for x, xy in ((q, query_xy), (k, key_xy)):
            angle = jnp.asarray(
                rope.rotary_angles_2d(np.array([xy], np.float32), HEAD_DIM, 10000.0)
            )
            turned.append(rope.rotate(x, jnp.cos(angle), jnp.sin(angle)))
        return jnp.sum(turned[0] * turned[1])

    np.testing.assert_allclose(product((5, 2), (3, 7)), product((12, 4), (10, 9)), rtol=1e-4)
    assert not np.isclose(product((5, 2), (3, 7)), product((2, 5), (7, 3)), rtol=1e-2)


def test_bfloat16_turns_in_float32():
    x = jax.random.normal(jax.random.key(0), (1, 2, PREFIX + 64, HEAD_DIM), jnp.bfloat16)
    cos = jnp.cos(angles(1))
    sin = jnp.sin(angles(1))
    rotated = rope.rotate(x, cos, sin)
    assert rotated.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        rotated, rope.rotate(x.astype(jnp.float32), cos, sin).astype(jnp.bfloat16)
    )
