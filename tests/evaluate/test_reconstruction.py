"""A tokenizer's scores, against its own encoding and decoding image by image."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from bitdance_jax.errors import ConfigError
from bitdance_jax.evaluate.features import Extractor
from bitdance_jax.evaluate.images import ArrayImages
from bitdance_jax.evaluate.psnr import psnr
from bitdance_jax.evaluate.reconstruction import evaluate_tokenizer
from bitdance_jax.fid.frechet import frechet_distance
from bitdance_jax.fid.inception import Features
from bitdance_jax.fid.statistics import gaussian
from bitdance_jax.pipelines.tokenizer import Tokenizer
from bitdance_jax.tokenizer.ssim import ssim


IMAGES = np.random.default_rng(0).integers(0, 256, (7, 16, 12, 3)).astype(np.uint8)


@pytest.fixture(scope="module", params=["plain", "gan"])
def tokenizer(request):
    config = tiny_models.TOKENIZER if request.param == "plain" else tiny_models.GAN_TOKENIZER
    return Tokenizer(config, tiny_models.tokenizer_params(config))


def test_scores_and_pairs(tokenizer):
    extractor = Extractor(lambda _, x: Features(x.astype(jnp.float32).mean((1, 2))), {}, 3)
    result = evaluate_tokenizer(
        tokenizer, ArrayImages(IMAGES), extractor, batch_size=3, show=4, progress=False
    )
    parts = [IMAGES[np.minimum(np.arange(i, i + 3), 6)] for i in (0, 3, 6)]
    decoded = np.concatenate(
        [
            tokenizer.decode(tokenizer.encode(part), first_index=3 * i)
            for i, part in enumerate(parts)
        ]
    )[:7]
    assert result.scores.psnr == pytest.approx(psnr(IMAGES, decoded).mean())
    assert result.scores.ssim == pytest.approx(float(ssim(IMAGES, decoded).mean()), abs=1e-5)
    real, made = (gaussian(images.mean((1, 2)).astype(np.float32)) for images in (IMAGES, decoded))
    assert result.scores.rfid == pytest.approx(frechet_distance(made, real), rel=1e-4)
    np.testing.assert_array_equal(
        result.pairs, np.stack([IMAGES[:4], decoded[:4]], axis=1).reshape(8, 16, 12, 3)
    )


def test_without_a_feature_network_there_is_no_rfid(tokenizer):
    result = evaluate_tokenizer(
        tokenizer, ArrayImages(IMAGES), None, batch_size=3, show=99, progress=False
    )
    assert result.scores.rfid is None
    assert len(result.pairs) == 14
    assert str(result.scores) == f"PSNR: {result.scores.psnr:.4f}\nSSIM: {result.scores.ssim:.4f}"


def test_sides_that_the_tokenizer_cannot_take(tokenizer):
    with pytest.raises(ConfigError, match=r"15 x 12.* image_size"):
        evaluate_tokenizer(tokenizer, ArrayImages(IMAGES[:, :15]), None, batch_size=3, show=4)
