"""The Fréchet distance: recorded values, closed forms, and the definition by a matrix root."""

import json

import numpy as np
import pytest
import scipy.linalg
from golden_models import GOLDEN, read

from bitdance_jax.errors import UserError
from bitdance_jax.fid.frechet import frechet_distance
from bitdance_jax.fid.statistics import Gaussian, gaussian


def random_gaussian(seed, dimensions=8, rank=None):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((dimensions, rank or dimensions))
    return Gaussian(rng.standard_normal(dimensions), factor @ factor.T)


@pytest.mark.parametrize("pair", ["ab", "ac"])
def test_recorded(pair):
    features = read("evaluation/features")
    expected = json.loads((GOLDEN / "evaluation" / "metrics.json").read_text())
    a, b = (gaussian(features[name]) for name in pair)
    assert frechet_distance(a, b) == pytest.approx(expected[f"fid_{pair}"], rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected[f"fid_{pair}"], rel=1e-6)


def test_commuting_covariances():
    """If they are diagonal: |mean difference|² + squared differences of the standard deviations."""
    a = Gaussian(np.array([1.0, 2.0, 3.0]), np.diag([1.0, 4.0, 9.0]))
    b = Gaussian(np.array([1.0, 0.0, 4.0]), np.diag([25.0, 4.0, 1.0]))
    assert frechet_distance(a, b) == pytest.approx(0 + 4 + 1 + (1 - 5) ** 2 + 0 + (3 - 1) ** 2)


def test_definition():
    a, b = random_gaussian(0), random_gaussian(1)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_equal_gaussians():
    a = random_gaussian(0, dimensions=50)
    assert 0 <= frechet_distance(a, a) < 1e-6


def test_singular_covariances():
    """Of rank 1 along different axes, without overlap, and of rank 3 with complete overlap."""
    a, b = (Gaussian(np.zeros(3), np.diag(variances)) for variances in ([4.0, 0, 0], [0, 9.0, 0]))
    assert frechet_distance(a, b) == pytest.approx(13)
    c = random_gaussian(0, dimensions=20, rank=3)
    assert 0 <= frechet_distance(c, c) < 1e-5


def test_other_dimensions():
    with pytest.raises(UserError, match="8 and 3 dimensions"):
        frechet_distance(random_gaussian(0), random_gaussian(0, 3))
