"""Features of a stream of images: every image once and in order, on one or several devices."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from bitdance_jax.evaluate.features import Extractor
from bitdance_jax.evaluate.images import ArrayImages
from bitdance_jax.fid.inception import Features


IMAGES = np.random.default_rng(0).integers(0, 256, (11, 4, 6, 3)).astype(np.uint8)


def network(params, images):
    x = images.astype(jnp.float32)
    return Features(x.mean((1, 2)) * params["scale"], logits=x[:, 0, 0])


@pytest.mark.parametrize("batch", [1, 4, 11, 30])
def test_every_image_once_and_in_order(batch):
    extractor = Extractor(network, {"scale": np.float32(2)}, batch)
    batches = list(extractor.stream(ArrayImages(IMAGES), "images", progress=False))
    assert [len(b.pooled) for b in batches] == [
        min(batch, 11 - start) for start in range(0, 11, batch)
    ]
    np.testing.assert_allclose(
        np.concatenate([b.pooled for b in batches]), 2 * IMAGES.mean((1, 2)), rtol=1e-6
    )
    np.testing.assert_array_equal(np.concatenate([b.logits for b in batches]), IMAGES[:, 0, 0])
    assert all(b.spatial is None and isinstance(b.pooled, np.ndarray) for b in batches)


def test_one_batch():
    extractor = Extractor(network, {"scale": np.float32(2)}, 4)
    np.testing.assert_allclose(extractor(IMAGES[:3]).pooled, 2 * IMAGES[:3].mean((1, 2)), rtol=1e-6)


SEVERAL_DEVICES = """
import jax, numpy as np
from test_features import IMAGES, network
from bitdance_jax.evaluate.features import Extractor
from bitdance_jax.evaluate.images import ArrayImages
assert len(jax.local_devices()) == 4
extractor = Extractor(network, {"scale": np.float32(2)}, 6)
assert extractor.batch_size == 8
(first, second) = extractor.stream(ArrayImages(IMAGES), "images", progress=False)
on_devices = extractor._start(IMAGES[:8]).pooled
assert len(on_devices.sharding.device_set) == 4
assert on_devices.addressable_shards[0].data.shape == (2, 3)
both = np.concatenate([first.pooled, second.pooled])
np.testing.assert_allclose(both, 2 * IMAGES.mean((1, 2)), rtol=1e-6)
"""


def test_several_devices(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    subprocess.run([sys.executable, "-c", SEVERAL_DEVICES], cwd=Path(__file__).parent, check=True)
