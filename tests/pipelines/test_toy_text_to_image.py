"""The toy text-to-image model folder and its command."""

import sys

import jax
import numpy as np
import pytest

from bitdance_jax.cli import toy_text_to_image as command
from bitdance_jax.config import TextToImageConfig, from_dict
from bitdance_jax.errors import UserError
from bitdance_jax.io import model_folder
from bitdance_jax.models import text_to_image
from bitdance_jax.pipelines import toy_text_to_image
from bitdance_jax.text.prompt_tokenizer import PromptTokenizer
from bitdance_jax.tokenizer import autoencoder


def test_the_command_writes_a_whole_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["toy", str(tmp_path / "toy"), "--tokens-per-step", "16", "--seed", "1"]
    )
    command.main()
    assert "text_to_image model with random weights" in capsys.readouterr().out
    saved = model_folder.load(tmp_path / "toy", expect="text_to_image")
    config = from_dict(TextToImageConfig, saved.config)
    assert config == toy_text_to_image.config(16)
    abstract = {
        "model": text_to_image.abstract_params(config),
        "tokenizer": autoencoder.abstract_params(config.tokenizer),
    }
    model_folder.check_shapes(tmp_path, saved.params, abstract)
    prompts = PromptTokenizer(tmp_path / "toy" / "text_tokenizer")
    assert (prompts.image_tokens, prompts.tokens_per_step) == (config.image_tokens, 16)
    assert max(prompts.encode("一只猫", max_tokens=50)) < config.text.vocab_size


def test_the_command_removes_nobodys_files(tmp_path, monkeypatch):
    (tmp_path / "thesis.tex").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for place in (".", str(tmp_path)):
        monkeypatch.setattr(sys, "argv", ["toy", place, "--force"])
        with pytest.raises(UserError, match="is not a model folder"):
            command.main()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_seed_makes_the_weights():
    abstract = autoencoder.abstract_params(toy_text_to_image.config().tokenizer)
    first, same, other = (toy_text_to_image.random_params(abstract, seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, same)
    assert not np.array_equal(
        first["encoder"]["conv_in"]["kernel"], other["encoder"]["conv_in"]["kernel"]
    )
    assert all(np.all(leaf != 0) or leaf.size > 1000 for leaf in jax.tree.leaves(first))


def test_a_patch_that_is_no_square():
    with pytest.raises(UserError, match="tokens_per_step must be a square number, got 5"):
        toy_text_to_image.config(5)
