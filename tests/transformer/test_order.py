import golden_models
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import nhwc

from bitdance_jax.transformer import order


def numbered_grid(height: int, width: int) -> jnp.ndarray:
    """Every token contains its (x, y)."""
    y, x = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    return jnp.stack([x, y], axis=-1).astype(jnp.float32)[None]


@pytest.mark.parametrize("patch_side", [2, 4])
def test_patch_raster(patch_side):
    pieces = golden_models.read("pieces/pieces")
    grid = nhwc(pieces["patchify.in"])
    sequence = order.grid_to_sequence(grid, patch_side, "patch")
    np.testing.assert_array_equal(sequence, pieces[f"patchify.p{patch_side}"])
    np.testing.assert_array_equal(order.sequence_to_grid(sequence, 8, patch_side, "patch"), grid)


def test_token_raster_ignores_patches():
    grid = numbered_grid(4, 6)
    sequence = order.grid_to_sequence(grid, 2, "token")
    np.testing.assert_array_equal(sequence, grid.reshape(1, 24, 2))
    np.testing.assert_array_equal(order.sequence_to_grid(sequence, 4, 2, "token"), grid)


@pytest.mark.parametrize("kind", ["patch", "token"])
@pytest.mark.parametrize(("height", "width", "patch_side"), [(4, 8, 2), (8, 4, 4), (3, 5, 1)])
def test_not_square(height, width, patch_side, kind):
    grid = numbered_grid(height, width)
    sequence = order.grid_to_sequence(grid, patch_side, kind)
    np.testing.assert_array_equal(
        sequence[0], order.token_positions(height, width, patch_side, kind)
    )
    np.testing.assert_array_equal(order.sequence_to_grid(sequence, height, patch_side, kind), grid)


def test_tokens_of_a_patch_are_neighbours():
    positions = order.token_positions(4, 4, 2, "patch")
    np.testing.assert_array_equal(positions[:4], [[0, 0], [1, 0], [0, 1], [1, 1]])
    np.testing.assert_array_equal(positions[4:6], [[2, 0], [3, 0]])
