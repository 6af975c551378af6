"""Converting Qwen3 alone, the start of text-to-image training."""

import json
import shutil

import golden_models
import jax
import numpy as np
import pytest

from bitdance_jax.config import Qwen3Config, TextToImageConfig, TokenizerConfig, from_dict, to_dict
from bitdance_jax.convert import export, keys, parameters, released_text_to_image, safetensors_file
from bitdance_jax.convert.convert import convert
from bitdance_jax.errors import UserError
from bitdance_jax.io import model_folder
from bitdance_jax.nn.stack import unstack
from bitdance_jax.text.prompt_tokenizer import PromptTokenizer
from bitdance_jax.transformer import qwen3


PUBLISHED = {
    "0.6b": 596_049_920,
    "1.7b": 1_720_574_976,
    "4b": 4_022_468_096,
    "8b": 8_190_735_360,
    "14b": 14_768_307_200,
    "32b": 32_762_123_264,
}
"""Numbers of parameters on the models' pages, where a tied output layer is not counted."""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The language model of a recorded text-to-image model, as Hugging Face writes it."""
    folder = tmp_path_factory.mktemp("unpacked") / "Qwen3-toy"
    golden_models.release_folder("t2i_4x", folder)
    for file in folder.iterdir():
        if file.name.startswith(("vision_head", "projector", "ae")):
            file.unlink()
    return folder


@pytest.fixture
def release(unpacked, tmp_path):
    """A copy that tests change."""
    return shutil.copytree(unpacked, tmp_path / "Qwen3-toy")


@pytest.fixture(scope="module")
def converted(unpacked, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "model"
    convert(str(unpacked), str(out))
    return out


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def tensors(folder):
    loaded = safetensors_file.load_shards(folder, "model").tensors
    return {key: array.read() for key, array in loaded.items()}


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_sharded_folder(converted):
    folder = model_folder.load(converted, expect="language_model")
    expected = golden_models.text_to_image("t2i_4x")
    assert from_dict(Qwen3Config, folder.config) == expected.config.text
    assert folder.metadata == {"source": "Qwen3-toy"}
    assert {array.dtype.name for array in jax.tree.leaves(folder.params)} == {"bfloat16"}
    assert_same(unstack(folder.params), expected.params["text"])
    prompts = PromptTokenizer(converted / "text_tokenizer")
    assert prompts.encode(expected.prompt["prompt"], 100) == expected.prompt["cond_ids"]


def test_there_and_back(converted, unpacked, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 300_000)
    export.export(str(converted), str(tmp_path / "Qwen3-toy"))
    assert_same(tensors(tmp_path / "Qwen3-toy"), tensors(unpacked))
    convert(str(tmp_path / "Qwen3-toy"), str(tmp_path / "again"))
    again, first = model_folder.load(tmp_path / "again"), model_folder.load(converted)
    assert_same(again.params, first.params)
    assert (again.config, again.metadata) == (first.config, first.metadata)


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_output_layer_is_a_copy_of_the_embedding(release, tmp_path, stored, capsys):
    """Whether or not the file has it too, as those of the 0.6B and 1.7B models."""
    state = tensors(release)
    for file in release.glob("model*"):
        file.unlink()
    embedding = state["model.embed_tokens.weight"]
    del state["lm_head.weight"]
    if stored:
        state["lm_head.weight"] = embedding
    lazy = {key: parameters_of(array) for key, array in state.items()}
    safetensors_file.save(release / "model.safetensors", lazy, {"format": "pt"})
    edit_config(release, tie_word_embeddings=True)
    convert(str(release), str(tmp_path / "out"))
    assert "note" not in capsys.readouterr().out
    params = model_folder.load(tmp_path / "out").params
    np.testing.assert_array_equal(params["lm_head"]["kernel"], embedding.T)


def parameters_of(array):
    return parameters.LazyArray(array.shape, array.dtype, lambda: array)


def test_other_models_are_refused(release, tmp_path):
    def refuse(match, **values):
        before = (release / "config.json").read_text()
        edit_config(release, **values)
        with pytest.raises(UserError, match=match) as error:
            convert(str(release), str(tmp_path / "out"))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
        (release / "config.json").write_text(before)

    refuse("not a plain Qwen3.* model_type llama", model_type="llama")
    refuse("rope_scaling", rope_scaling={"rope_type": "yarn", "factor": 4.0})
    refuse("rope_type 'yarn'", rope_parameters={"rope_type": "yarn", "factor": 4.0})
    refuse("use_sliding_window True", use_sliding_window=True)
    refuse("layer_types .*sliding", layer_types=["full_attention", "sliding_attention"])
    refuse("attention_bias True", attention_bias=True)
    refuse("quantization_config", quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match="language model, without an image tokenizer"):
        convert(str(release), str(tmp_path / "out"), tokenizer_only=True)


def test_wrong_keys_are_listed_together(release, tmp_path):
    state = tensors(release)
    for file in release.glob("model*"):
        file.unlink()
    state["model.extra.weight"] = state["model.norm.weight"]
    state["model.norm.weight"] = state["model.norm.weight"][:-1]
    del state["model.layers.1.mlp.up_proj.weight"]
    lazy = {key: parameters_of(array) for key, array in state.items()}
    safetensors_file.save(release / "model.safetensors", lazy, {})
    with pytest.raises(UserError) as error:
        convert(str(release), str(tmp_path / "out"))
    message = str(error.value)
    assert "unknown key model.extra.weight; " in message
    assert "missing key model.layers.1.mlp.up_proj.weight; " in message
    assert "model.norm.weight has the shape [" in message

    (release / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"incomplete language model.*: tokenizer\.json$"):
        convert(str(release), str(tmp_path / "out"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config = Qwen3Config.released(name)
    params = qwen3.abstract_params(config)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    if name in ("0.6b", "1.7b", "4b"):
        count -= params["lm_head"]["kernel"].size
    assert count == PUBLISHED[name]
    shapes = parameters.release_shapes(params, keys.QWEN3)
    record = released_text_to_image.text_record(config)
    assert released_text_to_image.qwen3_config(shapes, record) == config


def test_text_to_image_models_from_language_models():
    """Of every size, and the released ones of 14B."""
    tokenizer = TokenizerConfig.d16c32()

    def vocabulary(name, tokens_per_step):
        text = Qwen3Config.released(name)
        config = TextToImageConfig.from_language_model(text, tokenizer, tokens_per_step)
        assert from_dict(TextToImageConfig, to_dict(config)) == config
        return config.text.vocab_size

    assert [vocabulary("0.6b", p) for p in (1, 4, 16, 64)] == [151936, 151936, 151940, 151988]
    assert vocabulary("32b", 16) == 151940
    assert TextToImageConfig.released("14b_64x").text.vocab_size == 151988
