"""Inception Score (arXiv 1606.03498)."""

import numpy as np
from jaxtyping import Float

from bitdance_jax.errors import UserError


SPLIT = 5000


def inception_score(logits: Float[np.ndarray, "B classes"], split: int = SPLIT) -> float:
    """exp(mean KL divergence between an image's class distribution and the mean distribution).

    The mean distribution is that of a split of the images, and the score the mean over the splits,
    as in ADM's suite.

    Args:
      logits: of the classifier, without its bias.
      split: number of consecutive images in a split; the last split may be smaller.

    Raises:
      UserError: no images, or logits that are not finite.
    """
    if not len(logits) or not np.isfinite(logits).all():
        raise UserError("the Inception Score needs at least 1 image, and finite logits")
    starts = range(0, len(logits), split)
    return float(np.mean([_split_score(logits[start : start + split]) for start in starts]))


def shuffled(logits: Float[np.ndarray, "B classes"]) -> Float[np.ndarray, "B classes"]:
    """In a fixed random order. Splits of files sorted by class have few classes, and low scores."""
    return logits[np.random.default_rng(0).permutation(len(logits))]


def _split_score(logits: Float[np.ndarray, "B classes"]) -> float:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    # A class of probability 0 for all images of the split does not count: 0 · log 0 = 0.
    mean = p.mean(axis=0)
    log_mean = np.log(mean, out=np.zeros_like(mean), where=mean > 0)
    return float(np.exp((p * (log_p - log_mean)).sum(axis=1).mean()))
