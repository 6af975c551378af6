"""Inception Score (arXiv 1606.03498)."""

import numpy as np
from jaxtyping import Float

from bitdance_jax.errors import UserError


SPLIT = 5000


def inception_score(logits: Float[np.ndarray, "N K"], split: int = SPLIT) -> float:
    """exp of the mean divergence of each image's class distribution from its split's mean one; averaged over splits, as in ADM's suite.

    Args:
      logits: of the classifier, without its bias.
      split: images a split, in their order; the last may be shorter.

    Raises:
      UserError: no images, or logits that are not finite.
    """
    if not len(logits) or not np.isfinite(logits).all():
        raise UserError("the Inception Score needs at least 1 image, and finite logits")
    return float(
        np.mean(
            [_split_score(logits[start : start + split]) for start in range(0, len(logits), split)]
        )
    )


def shuffled(logits: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    """In an order that is random and always the same: in a file sorted by class, a split would hold few classes and score low."""
    return logits[np.random.default_rng(0).permutation(len(logits))]


def _split_score(logits: Float[np.ndarray, "N K"]) -> float:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    # A class that no image of the split can have counts nothing: 0 · log 0 = 0.
    mean = p.mean(axis=0)
    log_mean = np.log(mean, out=np.zeros_like(mean), where=mean > 0)
    return float(np.exp((p * (log_p - log_mean)).sum(axis=1).mean()))
