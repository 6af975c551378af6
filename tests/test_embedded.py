"""The embedded model: its size, its reconstructions, and the labels of its images."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bitdance_jax
from bitdance_jax.configs import emoji_4x
from bitdance_jax.data.sources import EmojiSource
from bitdance_jax.evaluate.psnr import psnr


pytestmark = pytest.mark.usefixtures("optimized")  # computing takes longer than compiling

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "bitdance_jax" / "assets" / "emoji" / "model"


@pytest.fixture(scope="module")
def model():
    return bitdance_jax.load()


def test_config_and_size(model):
    assert model.config == emoji_4x.get_config().model
    assert model.class_names == EmojiSource("all").class_names
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 12e6


def test_psnr_of_held_out_images(model):
    images = EmojiSource("heldout").arrays["image"]
    assert len(images) == 100
    assert np.mean(psnr(model.tokenizer.decode(model.tokenizer.encode(images)), images)) >= 24


@pytest.mark.slow
def test_samples_look_like_their_labels(model):
    """At 16 x 16 pixels, the training image nearest to a sample often has its label.

    By chance the rate is 1/9; held-out images reach 0.62.
    """
    source = EmojiSource("train").arrays
    labels = np.repeat(np.arange(9), 4)
    samples = model.sample(labels.tolist(), seed=1, batch_size=len(labels), progress=False)

    def shrink(images):
        return images.reshape(-1, 16, 4, 16, 4, 3).mean(axis=(2, 4)).reshape(len(images), -1)

    distances = np.square(shrink(samples)[:, None] - shrink(source["image"])[None]).mean(axis=-1)
    nearest = source["label"][distances.argmin(axis=1)]
    assert np.mean(nearest == labels) >= 0.5


@pytest.mark.slow(30)
def test_sampling_a_grid_takes_less_than_a_minute(tmp_path):
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "sample.py"), "--out", str(tmp_path / "samples.png")]
    as_users = os.environ | {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    process = subprocess.run(command, env=as_users, capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 60
    assert "72 images of 9 labels" in process.stdout
    with Image.open(tmp_path / "samples.png") as image:
        assert image.width > 8 * 128
        assert image.height > 9 * 128
