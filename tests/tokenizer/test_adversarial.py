"""Discriminator and losses against two recorded steps."""

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vgg_weights import lpips_params

from bitdance_jax.tokenizer import adversarial, perceptual
from bitdance_jax.tokenizer.adversarial import LogitMeans
from bitdance_jax.tokenizer.discriminator import PatchDiscriminator


MODEL = PatchDiscriminator(filters=8)
GROUPS = {"conv_0": 0, "conv_1": 2, "norm_1": 3, "conv_2": 5, "norm_2": 6, "conv_3": 8}
GROUPS |= {"norm_3": 9, "conv_4": 11}
ENTROPY, COMMITMENT = -1.0, 0.37


def ours(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, dict[str, np.ndarray]]:
    """Recorded tensors of discriminator weights, as our parameters; those that were recorded."""
    params: dict[str, dict[str, np.ndarray]] = {}
    for name, number in GROUPS.items():
        found = {}
        for kind in ("weight", "bias"):
            value = tensors.get(f"{prefix}{number}.{kind}")
            if value is not None and kind == "weight":
                is_kernel = value.ndim == 4
                found["kernel" if is_kernel else "scale"] = (
                    value.transpose(2, 3, 1, 0) if is_kernel else value
                )
            elif value is not None:
                found["bias"] = value
        if found:
            params[name] = found
    return params


def nhwc(images: np.ndarray) -> jax.Array:
    return jnp.asarray(images.transpose(0, 2, 3, 1))


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return golden_models.read("adversarial/train")


def generator_loss(y, x, params):
    nll = jnp.mean(jnp.abs(x - y)) + jnp.mean(perceptual.lpips(lpips_params(), x, y))
    fake = MODEL.apply({"params": params}, y, mutable=["batch_stats"])[0]
    term = 0.1 * adversarial.generator_term(fake)
    return nll + term + 0.1 * ENTROPY + 0.25 * COMMITMENT, (nll, term)


def discriminator_loss(params, x, y, means):
    real = MODEL.apply({"params": params}, x, mutable=["batch_stats"])[0]
    fake = MODEL.apply({"params": params}, y, mutable=["batch_stats"])[0]
    means = means.update(real, fake)
    loss = adversarial.hinge(real, fake) + 0.05 * adversarial.lecam(real, fake, means)
    return loss, means


generator_gradient = jax.jit(jax.value_and_grad(generator_loss, has_aux=True))
discriminator_gradient = jax.jit(jax.value_and_grad(discriminator_loss, has_aux=True))


def assert_close_but_for_kinks(actual, expected, others) -> None:
    """Equal to 1e-4 of the largest value, except where rounding decides a ReLU's side.

    There the gradient jumps, as it does between runs (`others`) whose images differ in the last
    digit. Each jump reaches the pixels that the feature sees.
    """
    spread = np.max(others, axis=0) - np.min(others, axis=0)
    allowed = 1e-4 * np.max(np.abs(expected))
    assert np.mean(spread > allowed) < 0.25
    np.testing.assert_array_less(np.abs(actual - expected), allowed + spread)


@pytest.mark.slow(15)
def test_both_losses_and_their_gradients_are_as_recorded(recorded):
    params = ours(recorded, "discriminator.main.")
    means = LogitMeans.zeros()
    for step in ("0.", "1."):
        x = nhwc(recorded[f"{step}x"])
        y = nhwc(recorded[f"{step}y"])
        (loss, (nll, term)), gradient = generator_gradient(y, x, params)
        np.testing.assert_allclose(loss, recorded[f"{step}generator_loss"], rtol=1e-5)
        np.testing.assert_allclose(nll, recorded[f"{step}nll"], rtol=1e-5)
        np.testing.assert_allclose(term, recorded[f"{step}g_loss"], rtol=1e-5)
        assert_close_but_for_kinks(
            gradient,
            nhwc(recorded[f"{step}grad_y"]),
            [
                generator_gradient(golden_models.perturb(y, seed), x, params)[1]
                for seed in range(16)
            ],
        )

        (loss, means), gradients = discriminator_gradient(params, x, y, means)
        np.testing.assert_allclose(loss, recorded[f"{step}discriminator_loss"], rtol=1e-5)
        np.testing.assert_allclose(means.real, recorded[f"{step}lecam_real"], rtol=1e-5)
        np.testing.assert_allclose(means.fake, recorded[f"{step}lecam_fake"], rtol=1e-5)
        expected = ours(recorded, f"{step}grad.main.")
        assert len(expected) == 4
        for layer, tensors in expected.items():
            for name, tensor in tensors.items():
                assert golden_models.largest_error(gradients[layer][name], tensor) < 1e-4, layer


def test_lecam_has_no_gradient_through_the_means():
    means = LogitMeans(jnp.array(0.5), jnp.array(-0.5))
    real = jnp.full((1, 2, 2), 2.0)
    fake = jnp.full((1, 2, 2), -2.0)
    gradient = jax.grad(lambda means: adversarial.lecam(real, fake, means))(means)
    assert gradient == LogitMeans(0, 0)
    # Real logits are compared with the mean of the fake ones, and the other way round.
    assert adversarial.lecam(real, fake, means) == 2.5**2 + 2.5**2
