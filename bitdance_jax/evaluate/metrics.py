"""Features to scores: everything that ADM's suite reports, for any feature network."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bitdance_jax.errors import UserError
from bitdance_jax.evaluate.features import Features
from bitdance_jax.evaluate.fid import frechet_distance
from bitdance_jax.evaluate.inception_score import SPLIT, inception_score, shuffled
from bitdance_jax.evaluate.precision_recall import BLOCK, NEIGHBOURS, precision_recall
from bitdance_jax.evaluate.statistics import Gaussian, RunningGaussian


@dataclass(frozen=True)
class FeatureSet:
    """What the scores need to know of a set of images. None where the network or a reference file does not tell.

    Attributes:
      pooled: mean and covariance of the pooled features.
      spatial: of the spatial features.
      vectors: the pooled features themselves, for the manifolds of precision and recall.
      logits: of the classifier.
    """

    pooled: Gaussian
    spatial: Gaussian | None = None
    vectors: Float[np.ndarray, "M D"] | None = None
    logits: Float[np.ndarray, "N K"] | None = None


@dataclass(frozen=True)
class Scores:
    """None where the features for a score are missing.

    Attributes:
      fid: Fréchet distance of the pooled features; lower is better, and so on.
      sfid: of the spatial features.
      inception_score: of splits drawn at random; higher is better, like the next two.
      precision: share of samples inside the reference's manifold.
      recall: share of the reference inside the samples' manifold.
    """

    fid: float
    sfid: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None

    def __str__(self) -> str:
        """One line a score, in the order of ADM's suite."""
        rows = {"Inception Score": self.inception_score, "FID": self.fid, "sFID": self.sfid}
        rows |= {"Precision": self.precision, "Recall": self.recall}
        return "\n".join(
            f"{name}: {value:.4f}" for name, value in rows.items() if value is not None
        )


def collect(
    batches: Iterable[Features], max_vectors: int | None = None, count: int | None = None
) -> FeatureSet:
    """The feature set of batches, such as `Extractor.stream` gives.

    Args:
      batches: features of one image or more each.
      max_vectors: keep this many of the pooled features, evenly spaced over all `count` of them; None keeps all.
      count: how many there are in all; needed with `max_vectors`.

    Raises:
      UserError: fewer than two images, or features that are not finite.
    """
    pooled, spatial = RunningGaussian(), RunningGaussian()
    vectors, logits = [], []
    kept = (
        None
        if max_vectors is None or count is None or count <= max_vectors
        else np.arange(max_vectors) * count // max_vectors
    )
    for batch in batches:
        first = pooled.count
        features = np.asarray(batch.pooled)
        pooled.add(features)
        vectors.append(
            features
            if kept is None
            else features[kept[(kept >= first) & (kept < pooled.count)] - first]
        )
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
      split: images a split of the Inception Score.
      neighbours: k of the manifolds.
      block: features on a side of a block of distances.
      progress: show a bar for the manifolds.

    Raises:
      UserError: features of other dimensions, too few for the manifolds, or not finite.
    """
    sfid = (
        frechet_distance(samples.spatial, reference.spatial)
        if samples.spatial and reference.spatial
        else None
    )
    precision = recall = None
    if samples.vectors is not None and reference.vectors is not None:
        if samples.vectors.shape[1] != reference.vectors.shape[1]:
            raise UserError(
                "samples and reference have features of different networks; use one for both"
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
        inception_score=None
        if samples.logits is None
        else inception_score(shuffled(samples.logits), split),
        precision=precision,
        recall=recall,
    )
