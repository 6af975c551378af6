import json

import numpy as np
import pytest
from golden_models import GOLDEN, read

from bitdance_jax.errors import UserError
from bitdance_jax.evaluate.inception_score import inception_score


@pytest.mark.parametrize("splits", [1, 5])
def test_recorded(splits):
    logits = read("evaluation/features")["logits"]
    expected = json.loads((GOLDEN / "evaluation" / "metrics.json").read_text())[
        f"isc_splits{splits}"
    ]["inception_score_mean"]
    assert inception_score(logits, len(logits) // splits) == pytest.approx(expected, rel=1e-9)


def test_balanced_certain_images_score_the_number_of_classes():
    certain = np.where(np.eye(7), 0.0, -1000.0).astype(np.float32)
    assert inception_score(np.tile(certain, (3, 1))) == pytest.approx(7)


@pytest.mark.parametrize("logits", [np.zeros((6, 4)), np.tile([1000.0, 0, 0, 0], (6, 1))])
def test_equal_images_score_one(logits):
    assert inception_score(logits.astype(np.float32)) == pytest.approx(1)


def test_a_smaller_last_split_has_the_same_weight():
    logits = np.random.default_rng(0).standard_normal((25, 9)).astype(np.float32) * 3
    parts = [
        inception_score(logits[:10]),
        inception_score(logits[10:20]),
        inception_score(logits[20:]),
    ]
    assert inception_score(logits, 10) == pytest.approx(np.mean(parts))
    assert len(set(parts)) == 3


def test_a_constant_added_to_the_logits_changes_nothing():
    logits = np.random.default_rng(0).standard_normal((25, 9)).astype(np.float32)
    assert inception_score(logits + np.float32(5000)) == pytest.approx(
        inception_score(logits), rel=1e-3
    )


@pytest.mark.parametrize("logits", [np.zeros((0, 4)), np.array([[0, np.nan]])])
def test_no_images_or_nan(logits):
    with pytest.raises(UserError, match="finite logits"):
        inception_score(logits)
