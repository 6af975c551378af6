from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import largest_error
from random_params import random_params

from bitdance_jax.config import TokenizerConfig, TokenizerLossConfig
from bitdance_jax.tokenizer import lfq
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.tokenizer.losses import tokenizer_loss


CONFIG = TokenizerConfig(bits=4, ch=32, ch_mult=(1, 2), num_res_blocks=1, num_codebooks=2)
WEIGHTS = TokenizerLossConfig(l1=0.5, l2=2.0, entropy=0.3, commitment=0.7, temperature=0.1)


def brightness(reconstruction: jax.Array, images: jax.Array) -> jax.Array:
    return jnp.square(jnp.mean(reconstruction) - jnp.mean(images))


def loss_of(reconstruction, z, images, image_terms=None):
    return tokenizer_loss(
        reconstruction,
        z,
        images,
        config=WEIGHTS,
        num_codebooks=CONFIG.num_codebooks,
        image_terms=image_terms,
    )


class Losses(NamedTuple):
    """Loss, parts and gradient with an image term of weight 0 and 1, and their inputs."""

    without_term: tuple
    with_term: tuple
    images: jax.Array
    reconstruction: jax.Array
    z: jax.Array


@pytest.fixture(scope="module")
def losses() -> Losses:
    model = Autoencoder(CONFIG)
    images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3), minval=-1.0)
    params = random_params(model, images)

    @jax.jit
    def run(params, weight):
        def loss(params):
            reconstruction, z = model.apply({"params": params}, images)
            return loss_of(reconstruction, z, images, {"brightness": (weight, brightness)})

        return jax.value_and_grad(loss, has_aux=True)(params)

    return Losses(
        run(params, 0.0),
        run(params, 10.0),
        images,
        *jax.jit(model.apply)({"params": params}, images),
    )


def test_parts(losses):
    error = np.asarray(losses.reconstruction, np.float64) - np.asarray(losses.images, np.float64)
    sample_entropy, codebook_entropy = lfq.entropy_terms(
        losses.z, CONFIG.num_codebooks, WEIGHTS.temperature
    )
    expected = {
        "l1": np.mean(np.abs(error)),
        "l2": np.mean(error**2),
        "sample_entropy": sample_entropy,
        "codebook_entropy": codebook_entropy,
        "commitment": lfq.commitment(losses.z),
        "brightness": brightness(losses.reconstruction, losses.images),
    }
    (_, parts), _ = losses.without_term
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-4, err_msg=name)


def test_loss_is_the_weighted_sum(losses):
    (loss, parts), _ = losses.without_term
    entropy = parts["sample_entropy"] - parts["codebook_entropy"]
    expected = 0.5 * parts["l1"] + 2.0 * parts["l2"] + 0.3 * entropy + 0.7 * parts["commitment"]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_image_terms_are_added_and_reported(losses):
    (loss, _), gradient = losses.without_term
    (loss_with_term, parts), gradient_with_term = losses.with_term
    term = brightness(losses.reconstruction, losses.images)
    assert 10 * term > 1e-3 * loss
    np.testing.assert_allclose(parts["brightness"], term, rtol=1e-4)
    np.testing.assert_allclose(loss_with_term, loss + 10 * term, rtol=1e-5)
    # Its gradient goes through the decoder, and straight through the bits to the encoder.
    for part in ("decoder", "encoder"):
        assert (
            largest_error(
                gradient_with_term[part]["conv_in"]["kernel"], gradient[part]["conv_in"]["kernel"]
            )
            > 1e-3
        )


def test_without_image_terms():
    images = jnp.zeros((1, 8, 8, 3))
    _, parts = jax.eval_shape(loss_of, images, jnp.zeros((1, 4, 4, 4)), images)
    assert set(parts) == {"l1", "l2", "sample_entropy", "codebook_entropy", "commitment"}
