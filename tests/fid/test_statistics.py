import numpy as np
import pytest

from bitdance_jax.errors import FileError, UserError
from bitdance_jax.fid.statistics import RunningGaussian, gaussian, read_statistics


def features(count=50, dimensions=6):
    return (
        np.random.default_rng(0).standard_normal((count, dimensions)) @ np.diag([1, 2, 3, 4, 5, 6])
        + 100
    ).astype(np.float32)


@pytest.mark.parametrize("batch", [1, 7, 50, 80])
def test_batches_give_mean_and_covariance(batch):
    x = features()
    running = RunningGaussian()
    for start in range(0, len(x), batch):
        running.add(x[start : start + batch])
    result = running.result()
    assert result.count == 50
    np.testing.assert_allclose(result.mean, x.astype(float).mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(
        result.covariance, np.cov(x.astype(float), rowvar=False), rtol=1e-10, atol=1e-12
    )


def test_a_large_mean_costs_no_precision():
    """Sums of squares would lose all of a variance of 1e-6 around a mean of 1e6."""
    x = 1e6 + 1e-3 * np.random.default_rng(0).standard_normal((100, 2))
    running = RunningGaussian()
    for row in x:
        running.add(row[None])
    np.testing.assert_allclose(
        running.result().covariance, np.cov(x, rowvar=False), rtol=1e-5, atol=1e-12
    )


def test_a_result_does_not_change_with_later_batches():
    running = RunningGaussian()
    running.add(features())
    before = running.result()
    mean, covariance = before.mean.copy(), before.covariance.copy()
    running.add(features(9) * 2)
    np.testing.assert_array_equal(before.mean, mean)
    np.testing.assert_array_equal(before.covariance, covariance)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few(count):
    with pytest.raises(UserError, match=f"at least 2 images, got {count}"):
        gaussian(features(count))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_named(value):
    x = features()
    x[13, 2] = value
    running = RunningGaussian()
    running.add(x[:10])
    with pytest.raises(UserError, match="image 13 are not finite"):
        running.add(x[10:])


def test_read():
    arrays = {
        "mu": np.arange(3.0),
        "sigma": np.eye(3, dtype=np.float32),
        "mu_s": np.zeros(2),
        "sigma_s": np.eye(2),
    }
    pooled = read_statistics("r.npz", arrays)
    np.testing.assert_array_equal(pooled.mean, np.arange(3.0))
    assert pooled.covariance.dtype == np.float64
    assert pooled.count is None
    assert read_statistics("r.npz", arrays, "_s").mean.shape == (2,)
    assert read_statistics("r.npz", {}) is None


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"mu": np.zeros(3)}, "sigma"),
        ({"sigma": np.eye(3)}, "mu"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"mu and sigma .*\(3,\) and \(2, 2\)"),
        ({"mu": np.zeros(3, int), "sigma": np.eye(3)}, "int64"),
        ({"mu": np.array([0, np.nan]), "sigma": np.eye(2)}, "finite"),
    ],
)
def test_bad_files(arrays, named):
    with pytest.raises(FileError, match=rf"r\.npz.*{named}"):
        read_statistics("r.npz", arrays)
