"""Scores from features: which features each formula gets, and missing scores."""

import numpy as np
import pytest

from bitdance_jax.errors import UserError
from bitdance_jax.evaluate.inception_score import inception_score, shuffled
from bitdance_jax.evaluate.metrics import FeatureSet, Scores, collect, score
from bitdance_jax.evaluate.precision_recall import precision_recall
from bitdance_jax.fid.frechet import frechet_distance
from bitdance_jax.fid.inception import Features
from bitdance_jax.fid.statistics import gaussian


def features(seed, count=30):
    rng = np.random.default_rng(seed)
    return Features(
        *(
            (rng.standard_normal((count, width)) + 0.3 * seed).astype(np.float32)
            for width in (5, 3, 4)
        )
    )


def in_batches(full, size):
    return [
        Features(*(x if x is None else x[i : i + size] for x in full))
        for i in range(0, len(full.pooled), size)
    ]


def test_collect():
    full = features(0)
    result = collect(in_batches(full, 7))
    for computed, expected in (
        (result.pooled, gaussian(full.pooled)),
        (result.spatial, gaussian(full.spatial)),
    ):
        np.testing.assert_allclose(computed.mean, expected.mean, atol=1e-12)
        np.testing.assert_allclose(computed.covariance, expected.covariance, atol=1e-12)
    np.testing.assert_array_equal(result.vectors, full.pooled)
    np.testing.assert_array_equal(result.logits, full.logits)


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(30, range(30)), (100, range(30)), (10, range(0, 30, 3)), (4, [0, 7, 15, 22]), (1, [0])],
)
def test_collect_keeps_evenly_spaced_vectors(limit, kept):
    full = features(0)
    result = collect(in_batches(full, 7), max_vectors=limit, count=30)
    np.testing.assert_array_equal(result.vectors, full.pooled[list(kept)])
    np.testing.assert_allclose(result.pooled.mean, gaussian(full.pooled).mean)


def test_score():
    samples, reference = features(1), features(0, 25)
    scores = score(collect([samples]), collect([reference]), split=10)
    assert scores.fid == pytest.approx(
        frechet_distance(gaussian(samples.pooled), gaussian(reference.pooled))
    )
    assert scores.sfid == pytest.approx(
        frechet_distance(gaussian(samples.spatial), gaussian(reference.spatial))
    )
    assert scores.inception_score == pytest.approx(inception_score(shuffled(samples.logits), 10))
    assert (scores.precision, scores.recall) == precision_recall(reference.pooled, samples.pooled)
    assert scores.precision != scores.recall


@pytest.mark.parametrize("labels", [np.arange(600) // 60, np.arange(600) % 10])
def test_the_inception_score_does_not_depend_on_the_order_of_the_classes(labels):
    """Files sorted by class, as the release writes them, and with alternating classes."""
    certain = features(0, 600)._replace(
        logits=np.where(np.arange(10) == labels[:, None], 20.0, 0.0).astype(np.float32)
    )
    assert inception_score(certain.logits, 60) < 1.1 or len(set(labels[:60])) == 10
    scores = score(collect([certain]), collect([features(1)]), split=60)
    assert scores.inception_score is not None and 9 < scores.inception_score <= 10
    assert scores == score(collect([certain]), collect([features(1)]), split=60)


def test_scores_without_features_are_none():
    pooled_only = Features(features(1).pooled)
    scores = score(collect([pooled_only]), FeatureSet(gaussian(features(0).pooled)))
    assert scores == Scores(scores.fid)
    assert scores.fid > 0
    assert str(scores) == f"FID: {scores.fid:.4f}"


def test_the_lines_are_in_the_order_of_adms_suite():
    assert str(Scores(1.68, 4.2, 297.1, 0.8, 0.62)).splitlines() == [
        "Inception Score: 297.1000",
        "FID: 1.6800",
        "sFID: 4.2000",
        "Precision: 0.8000",
        "Recall: 0.6200",
    ]


def test_features_of_two_networks():
    with pytest.raises(UserError, match="different networks"):
        score(collect([features(1)]), collect([Features(features(0).spatial)]))
