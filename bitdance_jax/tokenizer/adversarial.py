"""Losses of a discriminator and of the tokenizer against it: hinge and LeCAM; non-saturating.

The settings are those of WeTok (arXiv 2508.05599), which the paper's 4.1 follows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class LogitMeans(NamedTuple):
    """Running means of the discriminator's logits, for LeCAM.

    Attributes:
      real, fake: of images and of reconstructions.
    """

    real: Float[Array, ""]
    fake: Float[Array, ""]

    @classmethod
    def zeros(cls) -> "LogitMeans":
        return cls(jnp.zeros(()), jnp.zeros(()))

    def update(
        self, real: Float[Array, "B h w"], fake: Float[Array, "B h w"], decay: float = 0.999
    ) -> "LogitMeans":
        """The means after a batch of logits."""
        return LogitMeans(
            decay * self.real + (1 - decay) * jnp.mean(real),
            decay * self.fake + (1 - decay) * jnp.mean(fake),
        )


def generator_term(fake: Float[Array, "B h w"]) -> Float[Array, ""]:
    """Non-saturating loss of the tokenizer: softplus of minus each reconstruction's mean logit."""
    return jnp.mean(jax.nn.softplus(-jnp.mean(fake, axis=(1, 2))))


def hinge(real: Float[Array, "B h w"], fake: Float[Array, "B h w"]) -> Float[Array, ""]:
    """Hinge loss of the discriminator: real logits above 1, logits of reconstructions below -1."""
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def lecam(
    real: Float[Array, "B h w"], fake: Float[Array, "B h w"], means: LogitMeans
) -> Float[Array, ""]:
    """LeCAM regularization of the discriminator (Tseng et al. 2021, arXiv 2104.03310).

    Args:
      real, fake: logits.
      means: updated by this batch already; no gradient reaches them.
    """
    means = jax.lax.stop_gradient(means)
    above = jnp.mean(jnp.square(jax.nn.relu(real - means.fake)))
    below = jnp.mean(jnp.square(jax.nn.relu(means.real - fake)))
    return above + below
