"""MAR's `kl16.ckpt` layout: a file to a model folder and back."""

import dataclasses

import numpy as np
import pytest
import safetensors.numpy
import torch_writer
from released_kl import TINY, released_state

import bitdance_jax
from bitdance_jax.convert.convert import convert
from bitdance_jax.convert.export import export
from bitdance_jax.errors import FileError


def test_a_checkpoint_converts_there_and_back(tmp_path, capsys):
    state = released_state(TINY)
    other = {"loss.logvar": np.zeros(1, np.float32)}
    path = torch_writer.save(tmp_path / "kl.ckpt", {"model": state | other})
    convert(str(path), str(tmp_path / "model"))
    assert "loss.logvar" in capsys.readouterr().out
    tokenizer = bitdance_jax.Tokenizer.load(tmp_path / "model")
    # Files hold no scale.
    assert tokenizer.config == dataclasses.replace(TINY, latent_scale=1.0)
    export(str(tmp_path / "model"), str(tmp_path / "back.safetensors"))
    back = safetensors.numpy.load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys()
    for key, array in state.items():
        np.testing.assert_array_equal(back[key], array)
    convert(str(tmp_path / "back.safetensors"), str(tmp_path / "again"))
    assert bitdance_jax.Tokenizer.load(tmp_path / "again").config == tokenizer.config


def test_a_missing_key_is_named(tmp_path):
    state = released_state(TINY)
    del state["decoder.mid.attn_1.q.weight"]
    path = torch_writer.save(tmp_path / "kl.ckpt", {"model": state})
    with pytest.raises(FileError, match=r"missing key decoder\.mid\.attn_1\.q\.weight"):
        convert(str(path), str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()
