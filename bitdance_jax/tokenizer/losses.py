"""The tokenizer's training loss (paper 3.1): reconstruction, entropy, commitment, image terms."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from bitdance_jax.config import TokenizerLossConfig
from bitdance_jax.tokenizer import lfq


ImageTerm = Callable[[Float[Array, "B H W C"], Float[Array, "B H W C"]], Float[Array, ""]]
"""(reconstruction, images) -> another term of the loss, such as a perceptual one, unweighted."""


def tokenizer_loss(
    reconstruction: Float[Array, "B H W C"],
    z: Float[Array, "B h w K"],
    images: Float[Array, "B H W C"],
    *,
    config: TokenizerLossConfig,
    num_codebooks: int,
    image_terms: Mapping[str, tuple[float | Float[Array, ""], ImageTerm]] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Loss of a batch, and its parts before their weights.

    Args:
      reconstruction: the decoder's output.
      z: the encoder's output before the sign.
      images: in [-1, 1].
      config: weights.
      num_codebooks: groups of bits whose entropy is taken together.
      image_terms: by name, weight and term.

    Returns:
      The loss, and a dict with `l1`, `l2` (on the [-1, 1] scale), `sample_entropy` and
      `codebook_entropy` (nats), `commitment`, and each image term.
    """
    error = reconstruction.astype(jnp.float32) - images
    sample_entropy, codebook_entropy = lfq.entropy_terms(z, num_codebooks, config.temperature)
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
    for name, (weight, term) in (image_terms or {}).items():
        metrics[name] = term(reconstruction, images)
        loss = loss + weight * metrics[name]
    return loss, metrics
