"""LPIPS against the recorded distances, with VGG16's weights from the recording's seed."""

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vgg_weights import lpips_params

from bitdance_jax.tokenizer import perceptual


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return golden_models.read("perceptual/lpips")


def nhwc(images: np.ndarray) -> jax.Array:
    return jnp.asarray(images.transpose(0, 2, 3, 1))


def test_distance_and_gradient_are_as_recorded(recorded):
    params = lpips_params()
    a, b = nhwc(recorded["a"]), nhwc(recorded["b"])

    def mean_distance(b):
        distance = perceptual.lpips(params, a, b)
        return jnp.mean(distance), distance

    (_, distance), gradient = jax.jit(jax.value_and_grad(mean_distance, has_aux=True))(b)
    np.testing.assert_allclose(distance, recorded["distance"], rtol=1e-5)
    expected = nhwc(recorded["grad_b_of_mean"])
    assert golden_models.largest_error(gradient, expected) < 1e-4


def test_the_parameters_have_the_documented_shapes():
    shapes = jax.tree.map(lambda a: a.shape, lpips_params())
    assert shapes == jax.tree.map(lambda a: a.shape, perceptual.abstract_params())


def test_equal_images_have_no_distance_and_gradients_are_finite():
    params = lpips_params()
    images = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3), minval=-1.0)
    distance_and_gradient = jax.jit(
        jax.value_and_grad(lambda b, params: perceptual.lpips(params, images, b).sum())
    )
    distance, gradient = distance_and_gradient(images, params)
    assert distance == 0
    assert np.isfinite(gradient).all()
