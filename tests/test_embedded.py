"""The embedded models: their sizes, their tokenizers, and what the default prompts give."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bitdance_jax
from bitdance_jax.config import ClassConditionalConfig, from_dict
from bitdance_jax.configs import emoji_4x, emoji_t2i
from bitdance_jax.data.emoji import ARCHIVE, EXAMPLES, SIDE, EmojiArchive, EmojiSource, emoji_images
from bitdance_jax.evaluate.psnr import psnr
from bitdance_jax.io import image_files, model_lookup


pytestmark = pytest.mark.usefixtures("optimized")  # computing takes longer than compiling

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "bitdance_jax" / "assets" / "emoji"


@pytest.fixture(scope="module")
def model():
    return bitdance_jax.load(lazy=True)


def test_sizes_of_files():
    def size(name: str) -> int:
        return sum(path.stat().st_size for path in (ASSETS / name).rglob("*") if path.is_file())

    assert ARCHIVE.stat().st_size <= 9e6
    assert size("text_to_image") <= 10e6
    assert size("class_conditional") <= 6.5e6


def test_the_text_to_image_model_is_that_of_its_config(model):
    assert model.name == "emoji"
    assert model.config == emoji_t2i.get_config().model
    assert model.default_size == (SIDE, SIDE)


def test_the_class_conditional_model_has_names_for_its_classes():
    described = model_lookup.read_config("emoji_classes")
    config = from_dict(ClassConditionalConfig, described.config)
    assert config == emoji_4x.get_config().model
    assert described.metadata["class_names"] == list(EmojiSource().class_names)


def test_captions_are_a_few_tokens_of_the_prompt_tokenizer(model):
    """Most words are one or two tokens, and every caption is short enough for training's rows."""
    captions = [record["text"] for record in EmojiArchive().records]
    assert set(EXAMPLES) <= set(captions)
    template = len(model.prompts.encode("x", 1000)) - 1
    lengths = np.array([len(model.prompts.encode(text, 1000)) - template for text in captions])
    words = np.array([len(text.split()) for text in captions])
    assert (lengths / words).mean() < 3
    assert lengths.max() + template + (SIDE // 8) ** 2 < emoji_t2i.get_config().data.packing.row


def test_psnr_of_held_out_images():
    """Of other emoji than those that the tokenizer was trained on."""
    images = emoji_images("heldout", SIDE)[::8]
    tokenizer = bitdance_jax.Tokenizer.load("emoji")
    assert np.mean(psnr(tokenizer.decode(tokenizer.encode(images)), images)) >= 22


@pytest.mark.slow(25)
def test_the_default_prompts(tmp_path):
    """A labelled row each, with different images on white."""
    flags = ["--per-prompt", "1", "--head-steps", "5", "--out", str(tmp_path / "samples.png")]
    as_users = os.environ | {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    command = [sys.executable, str(ROOT / "sample.py"), *flags]
    process = subprocess.run(command, env=as_users, capture_output=True, text=True, check=True)
    assert "8 images of 128x128" in process.stdout
    with Image.open(tmp_path / "samples.png") as picture:
        pixels = np.asarray(picture)
    cell = SIDE + 2 * image_files.MARGIN
    assert pixels.shape[0] == len(EXAMPLES) * cell and pixels.shape[1] > 2 * cell
    cells = pixels[:, -cell:].reshape(len(EXAMPLES), cell, cell, 3)
    inside = slice(image_files.MARGIN, -image_files.MARGIN)
    images = cells[:, inside, inside].astype(float)
    edges = np.concatenate([images[:, 0], images[:, :, 0], images[:, :, -1]], axis=1)
    assert (np.median(edges, axis=(1, 2)) > 230).all()
    assert all(np.abs(a - b).mean() > 5 for a, b in itertools.combinations(images, 2))
    assert (pixels[:, :-cell].reshape(len(EXAMPLES), -1).min(axis=1) < 50).all()  # the labels
