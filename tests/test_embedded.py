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
from bitdance_jax.data.emoji import emoji_images
from bitdance_jax.evaluate.psnr import psnr


pytestmark = pytest.mark.usefixtures("optimized")  # computing takes longer than compiling

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "bitdance_jax" / "assets" / "emoji" / "model"


@pytest.fixture(scope="module")
def model():
    return bitdance_jax.load()


def test_config_and_size(model):
    assert model.config == emoji_4x.get_config().model
    assert len(model.class_names) == 9
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 12e6


def test_psnr_of_held_out_images(model):
    """Of other emoji than those that it was trained on."""
    images = emoji_images("heldout", 64)
    assert np.mean(psnr(model.tokenizer.decode(model.tokenizer.encode(images)), images)) >= 23


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
