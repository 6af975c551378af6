"""The tokenizer's training loss (SPEC 1): reconstruction + entropy + commitment, with a place for further image terms."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from bitdance_jax.config import TokenizerLossConfig
from bitdance_jax.tokenizer import lfq
from bitdance_jax.tokenizer.autoencoder import Autoencoder


ImageTerm = Callable[[Float[Array, "B H W C"], Float[Array, "B H W C"]], Float[Array, ""]]
"""(reconstruction, images) -> a further term, perceptual (LPIPS) or adversarial (a discriminator's verdict): its weight inside."""


def tokenizer_loss(
    model: Autoencoder,
    params: Any,
    images: Float[Array, "B H W C"],
    noise: Float[Array, "B h w K"] | None,
    config: TokenizerLossConfig,
    image_terms: Mapping[str, ImageTerm] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Loss of a batch, and its parts.

    Args:
      images: in [-1, 1].
      noise: standard normal, for a GAN decoder; None for a plain one.
      image_terms: by name; each is added to the loss and reported under its name.

    Returns:
      The loss, and a dict with `l1`, `l2` (on the [-1, 1] scale), `sample_entropy` and `codebook_entropy` (nats), `commitment`, and each
      image term.
    """
    outputs: Any = model.apply({"params": params}, images, noise)
    reconstruction, z = outputs
    error = reconstruction.astype(jnp.float32) - images
    sample_entropy, codebook_entropy = lfq.entropy_terms(
        z, model.config.num_codebooks, config.temperature
    )
    metrics = {
        "l1": jnp.mean(jnp.abs(error)),
        "l2": jnp.mean(jnp.square(error)),
        "sample_entropy": sample_entropy,
        "codebook_entropy": codebook_entropy,
        "commitment": lfq.commitment(z),
    }
    loss = (
        config.l1 * metrics["l1"]
        + config.l2 * metrics["l2"]
        + config.entropy * (sample_entropy - codebook_entropy)
        + config.commitment * metrics["commitment"]
    )
    for name, term in (image_terms or {}).items():
        metrics[name] = term(reconstruction, images)
        loss = loss + metrics[name]
    return loss, metrics
