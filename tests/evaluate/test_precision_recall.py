"""Precision and recall: recorded, by brute force, and of sets with a known answer."""

import json

import numpy as np
import pytest
from golden_models import GOLDEN, read

from bitdance_jax.errors import UserError
from bitdance_jax.evaluate.precision_recall import precision_recall


def brute_force(reference, samples, k):
    def radius(features, i):
        return sorted(np.sum((features - features[i]) ** 2, axis=1))[k]

    def inside(point, features):
        return any(
            np.sum((point - features[i]) ** 2) <= radius(features, i) for i in range(len(features))
        )

    precision = np.mean([inside(point, reference) for point in samples])
    return precision, np.mean([inside(point, samples) for point in reference])


def two_sets(seed=0):
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal((37, 4)).astype(np.float32)
    return reference, (0.7 * rng.standard_normal((53, 4)) + 0.5).astype(np.float32)


@pytest.mark.parametrize("pair", ["ab", "ac"])
def test_recorded(pair):
    features = read("evaluation/features")
    expected = json.loads((GOLDEN / "evaluation" / "metrics.json").read_text())[f"prc_{pair}"]
    samples, reference = (features[name] for name in pair)
    precision, recall = precision_recall(reference, samples)
    assert (precision, recall) == pytest.approx(
        (expected["precision"], expected["recall"]), abs=1e-6
    )


@pytest.mark.parametrize("k", [1, 3, 6])
def test_brute_force(k):
    reference, samples = two_sets(k)
    expected = brute_force(reference.astype(float), samples.astype(float), k)
    assert precision_recall(reference, samples, neighbours=k) == pytest.approx(expected)
    assert expected[0] != expected[1]


def test_the_block_size_does_not_matter():
    reference, samples = two_sets()
    expected = precision_recall(reference, samples)
    for block in (2, 10, 37, 53):
        assert precision_recall(reference, samples, block=block) == expected, block


def test_equal_sets_cover_each_other_and_far_ones_do_not():
    reference, samples = two_sets()
    assert precision_recall(samples, samples) == (1, 1)
    assert precision_recall(reference, samples + 100) == (0, 0)


def test_few_modes_are_precise_and_recall_little():
    """The reference has two clusters; the samples stay inside one of them."""
    cluster = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    precision, recall = precision_recall(
        np.concatenate([cluster, cluster + 100]), cluster[:10] * 0.01
    )
    assert precision == 1
    assert recall <= 0.5


@pytest.mark.parametrize(("reference", "samples", "name"), [(3, 9, "reference"), (9, 3, "samples")])
def test_too_few(reference, samples, name):
    with pytest.raises(UserError, match=f"more than 3 images in the {name}, got 3"):
        precision_recall(np.zeros((reference, 2), np.float32), np.zeros((samples, 2), np.float32))


def test_not_finite():
    reference, samples = two_sets()
    samples[3, 1] = np.nan
    with pytest.raises(UserError, match="features of the samples are not finite"):
        precision_recall(reference, samples)
