"""Metrics of a tokenizer's reconstructions of held-out images."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from bitdance_jax.fid import inception
from bitdance_jax.fid.frechet import frechet_distance
from bitdance_jax.fid.statistics import gaussian
from bitdance_jax.tokenizer.ssim import ssim
from bitdance_jax.train.task import Metrics


ORIGINALS = "original_features"
RECONSTRUCTIONS = "reconstruction_features"


def pixel_metrics(
    reconstruction: UInt8[Array, "B H W 3"], images: UInt8[Array, "B H W 3"]
) -> Metrics:
    """`psnr` (dB, peak 255) and `ssim`, means over the images."""
    error = reconstruction.astype(jnp.float32) - images.astype(jnp.float32)
    mean_squared = jnp.mean(jnp.square(error), axis=(1, 2, 3))
    return {
        "psnr": jnp.mean(10 * jnp.log10(255.0**2 / jnp.maximum(mean_squared, 1e-4))),
        "ssim": jnp.mean(ssim(reconstruction, images)),
    }


def bit_metrics(z: Float[Array, "B h w K"]) -> Metrics:
    """`bits_used`: share of the bits that take both values in the batch; `bit_balance`: 1 if every
    bit is positive half of the time, 0 if none ever changes."""
    share = jnp.mean(z > 0, axis=(0, 1, 2))  # of positive values, for each bit
    return {
        "bits_used": jnp.mean((share > 0) & (share < 1)),
        "bit_balance": jnp.mean(2 * jnp.minimum(share, 1 - share)),
    }


def inception_features(
    params: Any, reconstruction: UInt8[Array, "B H W 3"], images: UInt8[Array, "B H W 3"]
) -> dict[str, Any]:
    """Pooled Inception features [B, 2048] of both, for `rfid`."""
    return {
        ORIGINALS: inception.features(params, images).pooled,
        RECONSTRUCTIONS: inception.features(params, reconstruction).pooled,
    }


def rfid(features: dict[str, np.ndarray]) -> dict[str, float]:
    """`rfid`: the Fréchet distance between originals and reconstructions, from all features.

    Raises:
      UserError: features that are not finite.
    """
    distance = frechet_distance(gaussian(features[RECONSTRUCTIONS]), gaussian(features[ORIGINALS]))
    return {"rfid": distance}
