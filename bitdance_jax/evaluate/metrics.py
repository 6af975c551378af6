"""All scores of ADM's suite from features, for any feature network."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bitdance_jax.errors import UserError
from bitdance_jax.evaluate.inception_score import SPLIT, inception_score, shuffled
from bitdance_jax.evaluate.precision_recall import BLOCK, NEIGHBOURS, precision_recall
from bitdance_jax.fid.frechet import frechet_distance
from bitdance_jax.fid.inception import Features
from bitdance_jax.fid.statistics import Gaussian, RunningGaussian


@dataclass(frozen=True)
class FeatureSet:
    """The features of a set of images. None for what the network or a reference file does not have.

    Attributes:
      pooled: mean and covariance of the pooled features.
      spatial: mean and covariance of the spatial features.
      vectors: the pooled features, for the manifolds of precision and recall.
      logits: of the classifier.
    """

    pooled: Gaussian
    spatial: Gaussian | None = None
    vectors: Float[np.ndarray, "vectors D"] | None = None
    logits: Float[np.ndarray, "B classes"] | None = None


@dataclass(frozen=True)
class Scores:
    """The scores of a set of samples. None if the features for a score are missing.

    Attributes:
      fid: Fréchet distance of the pooled features; lower is better.
      sfid: Fréchet distance of the spatial features; lower is better.
      inception_score: with random splits; higher is better.
      precision: share of samples inside the reference's manifold; higher is better.
      recall: share of the reference inside the samples' manifold; higher is better.
    """

    fid: float
    sfid: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None

    def __str__(self) -> str:
        """One line for each score, in the order of ADM's suite."""
        rows = {"Inception Score": self.inception_score, "FID": self.fid, "sFID": self.sfid}
        rows |= {"Precision": self.precision, "Recall": self.recall}
        return "\n".join(
            f"{name}: {value:.4f}" for name, value in rows.items() if value is not None
        )


def collect(
    batches: Iterable[Features], max_vectors: int | None = None, count: int | None = None
) -> FeatureSet:
    """The feature set of batches, such as those of `Extractor.stream`.

    Args:
      batches: features of one or more images each.
      max_vectors: number of pooled features to keep, evenly spaced over all; None: all.
      count: total number of images; needed with `max_vectors`.

    Raises:
      UserError: fewer than two images, or features that are not finite.
    """
    pooled = RunningGaussian()
    spatial = RunningGaussian()
    vectors = []
    logits = []
    kept = None
    if max_vectors is not None and count is not None and count > max_vectors:
        kept = np.arange(max_vectors) * count // max_vectors
    for batch in batches:
        first = pooled.count
        features = np.asarray(batch.pooled)
        pooled.add(features)
        if kept is not None:
            features = features[kept[(kept >= first) & (kept < pooled.count)] - first]
        vectors.append(features)
        if batch.spatial is not None:
            spatial.add(np.asarray(batch.spatial))
        if batch.logits is not None:
            logits.append(np.asarray(batch.logits))
    return FeatureSet(
        pooled.result(),
        spatial.result() if spatial.count else None,
        np.concatenate(vectors),
        np.concatenate(logits) if logits else None,
    )


def score(
    samples: FeatureSet,
    reference: FeatureSet,
    *,
    split: int = SPLIT,
    neighbours: int = NEIGHBOURS,
    block: int = BLOCK,
    progress: bool = False,
) -> Scores:
    """All scores that the two feature sets allow.

    Args:
      samples: of generated images.
      reference: of real ones, by the same network.
      split: images in a split of the Inception Score.
      neighbours: k of the manifolds.
      block: side of a block of distances.
      progress: show a progress bar for the manifolds.

    Raises:
      UserError: features of different dimensions, too few for the manifolds, or not finite.
    """
    sfid = None
    if samples.spatial and reference.spatial:
        sfid = frechet_distance(samples.spatial, reference.spatial)
    quality = None
    if samples.logits is not None:
        quality = inception_score(shuffled(samples.logits), split)
    precision = None
    recall = None
    if samples.vectors is not None and reference.vectors is not None:
        if samples.vectors.shape[1] != reference.vectors.shape[1]:
            raise UserError(
                "cannot compare samples and reference with features of different networks; "
                "use the same for both"
            )
        precision, recall = precision_recall(
            reference.vectors,
            samples.vectors,
            neighbours=neighbours,
            block=block,
            progress=progress,
        )
    return Scores(
        fid=frechet_distance(samples.pooled, reference.pooled),
        sfid=sfid,
        inception_score=quality,
        precision=precision,
        recall=recall,
    )
