"""The network against torch-fidelity's, with its seeded weights."""

import functools

import jax
import numpy as np
import pytest
from golden_models import assert_close, read
from inception_weights import state_dict

from bitdance_jax.fid import inception, inception_weights


network = jax.jit(inception.features)


@functools.cache
def params():
    return inception_weights.convert(state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 256])
def test_features_logits_and_spatial_features(size):
    recorded = {
        key.removeprefix(f"{size}."): value
        for key, value in read("evaluation/inception").items()
        if key.startswith(f"{size}.")
    }
    features = network(params(), recorded["image"].transpose(0, 2, 3, 1))
    assert_close(features.pooled, recorded["features_2048"], 1e-5)
    assert_close(features.logits, recorded["logits_unbiased"], 1e-5)
    # NHWC, as the TensorFlow graph flattens it: the order of mu_s and sigma_s in reference files.
    assert_close(features.spatial, recorded["spatial_7"].transpose(0, 2, 3, 1).reshape(2, -1), 1e-5)
    assert features.pooled.shape == (2, inception.POOLED) and features.spatial.shape == (
        2,
        inception.SPATIAL,
    )
    assert not np.allclose(features.pooled[0], features.pooled[1])
