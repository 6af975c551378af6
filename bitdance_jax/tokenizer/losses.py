"""The tokenizer's training loss (paper 3.1): reconstruction, entropy, commitment, image terms."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from bitdance_jax.config import Latents, TokenizerLossConfig
from bitdance_jax.tokenizer import kl, lfq


ImageTerm = Callable[[Float[Array, "B H W C"], Float[Array, "B H W C"]], Float[Array, ""]]
"""(reconstruction, images) -> another term of the loss, such as a perceptual one, unweighted."""


def tokenizer_loss(
    reconstruction: Float[Array, "B H W C"],
    z: Float[Array, "B h w K"],
    images: Float[Array, "B H W C"],
    *,
    config: TokenizerLossConfig,
    num_codebooks: int,
    latents: Latents = "bits",
    image_terms: Mapping[str, tuple[float | Float[Array, ""], ImageTerm]] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Loss of a batch, and its parts before their weights.

    Args:
      reconstruction: the decoder's output.
      z: the encoder's output before the sign; for continuous latents, its moments.
      images: in [-1, 1].
      config: weights.
      num_codebooks: groups of bits whose entropy is taken together.
      latents: of the tokenizer.
      image_terms: by name, weight and term.

    Returns:
      The loss, and a dict with `l1`, `l2` (on the [-1, 1] scale); `sample_entropy` and
      `codebook_entropy` (nats) and `commitment` of bits, or `kl` of continuous latents (nats for
      each number of an image); and each image term.
    """
    error = reconstruction.astype(jnp.float32) - images
    metrics = {"l1": jnp.mean(jnp.abs(error)), "l2": jnp.mean(jnp.square(error))}
    loss = config.l1 * metrics["l1"] + config.l2 * metrics["l2"]
    if latents == "continuous":
        metrics["kl"] = jnp.sum(kl.divergence(z)) / images.size
        loss += config.kl * metrics["kl"]
    else:
        sample, codebook = lfq.entropy_terms(z, num_codebooks, config.temperature)
        metrics |= {"sample_entropy": sample, "codebook_entropy": codebook}
        metrics["commitment"] = lfq.commitment(z)
        loss += config.entropy * (sample - codebook) + config.commitment * metrics["commitment"]
    for name, (weight, term) in (image_terms or {}).items():
        metrics[name] = term(reconstruction, images)
        loss = loss + weight * metrics[name]
    return loss, metrics
