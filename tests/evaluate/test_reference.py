"""References: what is read from a file or folder, and what is computed."""

import jax.numpy as jnp
import numpy as np
import pytest

from bitdance_jax.errors import FileError
from bitdance_jax.evaluate import reference
from bitdance_jax.evaluate.features import Extractor
from bitdance_jax.evaluate.reference import Reference
from bitdance_jax.fid.inception import POOLED, SPATIAL, Features
from bitdance_jax.io import image_files


IMAGES = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3)).astype(np.uint8)
STATISTICS = {
    "mu": np.ones(POOLED),
    "sigma": np.eye(POOLED),
    "mu_s": np.ones(SPATIAL),
    "sigma_s": np.eye(SPATIAL),
}


@pytest.fixture(scope="module")
def extractor():
    return Extractor(lambda _, x: Features(x.mean((1, 2)), x[:, 0, 0].astype(jnp.float32)), {}, 4)


def save(tmp_path, **arrays):
    np.savez(tmp_path / "r.npz", **arrays)
    return tmp_path / "r.npz"


def test_statistics_from_the_file_and_manifold_from_its_images(tmp_path, extractor):
    opened = Reference(save(tmp_path, arr_0=IMAGES, **STATISTICS), (8, 8))
    features = opened.features(extractor, progress=False)
    assert opened.missing == []
    np.testing.assert_array_equal(features.pooled.mean, STATISTICS["mu"])
    np.testing.assert_array_equal(features.spatial.covariance, STATISTICS["sigma_s"])
    np.testing.assert_allclose(features.vectors, IMAGES.mean((1, 2)), rtol=1e-6)
    assert features.logits is None


def test_all_from_images(tmp_path, extractor):
    features = Reference(save(tmp_path, arr_0=IMAGES), (8, 8)).features(extractor, progress=False)
    np.testing.assert_allclose(features.pooled.mean, IMAGES.mean((0, 1, 2)), rtol=1e-6)
    assert features.spatial.count == features.pooled.count == len(features.vectors) == 9


def test_statistics_only(tmp_path, extractor):
    opened = Reference(save(tmp_path, mu=STATISTICS["mu"], sigma=STATISTICS["sigma"]), (8, 8))
    features = opened.features(extractor)
    assert features.vectors is None
    assert features.spatial is None
    assert "precision and recall" in opened.missing[0]
    assert "sFID" in opened.missing[1]


def test_folder_is_cropped_to_the_samples_and_its_manifold_is_limited(
    tmp_path, extractor, monkeypatch
):
    monkeypatch.setattr(reference, "MANIFOLD_IMAGES", 3)
    for i, image in enumerate(IMAGES):
        image_files.save_png(tmp_path / f"{i}.png", np.pad(image, ((0, 0), (2, 2), (0, 0))))
    features = Reference(tmp_path, (8, 8)).features(extractor, progress=False)
    np.testing.assert_allclose(features.vectors, IMAGES[[0, 3, 6]].mean((1, 2)), rtol=1e-6)
    assert features.pooled.count == 9


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"arr_0": IMAGES[:, :4]}, "4 x 8.* 8 x 8"),
        ({"labels": np.zeros(3)}, "mu and sigma .*arr_0.* labels"),
        (
            {"mu": np.ones(3), "sigma": np.eye(3)},
            "3 features.* 2048",
        ),
        ({"mu": np.ones(POOLED), "arr_0": IMAGES}, "has no array sigma"),
        ({"mu_s": np.ones(SPATIAL)}, "has no array sigma_s"),
        ({"arr_0": IMAGES.astype(float)}, "arr_0 .*uint8"),
    ],
)
def test_bad_files(tmp_path, arrays, named):
    with pytest.raises(FileError, match=named):
        Reference(save(tmp_path, **arrays), (8, 8))


def test_no_file(tmp_path):
    with pytest.raises(FileError, match="no reference file or folder"):
        Reference(tmp_path / "r.npz", (8, 8))
    (tmp_path / "r.npz").write_text("not a zip file")
    with pytest.raises(FileError, match=r"cannot be read as an .npz"):
        Reference(tmp_path / "r.npz", (8, 8))


def test_files_that_would_hang_or_fill_the_memory(tmp_path, monkeypatch):
    with pytest.raises(FileError, match="/dev/zero is not a file"):
        Reference("/dev/zero", (8, 8))
    (tmp_path / "r.npz").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    with pytest.raises(FileError, match="pointer of Git LFS"):
        Reference(tmp_path / "r.npz", (8, 8))
    monkeypatch.setattr(reference, "MAX_STATISTICS_BYTES", 2**20)
    np.savez_compressed(tmp_path / "r.npz", mu=np.zeros(POOLED), sigma=np.zeros((POOLED, POOLED)))
    with pytest.raises(FileError, match=r"sigma of .*r\.npz is too large"):
        Reference(tmp_path / "r.npz", (8, 8))
