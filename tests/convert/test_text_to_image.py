"""Converting and exporting text-to-image models, with the recorded models of tests/golden."""

import dataclasses
import json
import shutil
import sys

import golden_models
import jax
import numpy as np
import pytest
from golden_models import TEXT_TO_IMAGE

from bitdance_jax.cli.convert import main
from bitdance_jax.config import TextToImageConfig, TokenizerConfig, from_dict
from bitdance_jax.convert import (
    export,
    keys,
    parameters,
    release_folder,
    released_configs,
    released_text_to_image,
    safetensors_file,
)
from bitdance_jax.convert.convert import convert
from bitdance_jax.errors import ConfigError, UserError
from bitdance_jax.io import model_folder
from bitdance_jax.models import text_to_image
from bitdance_jax.nn.stack import unstack
from bitdance_jax.pipelines import toy_text_to_image
from bitdance_jax.text.prompt_tokenizer import PromptTokenizer


DIFFUSERS = {
    "config.json": "text_encoder/config.json",
    "ae.safetensors": "autoencoder/diffusion_pytorch_model.safetensors",
    "ae_config.json": "autoencoder/config.json",
    "vision_head.safetensors": "diffusion_head/diffusion_pytorch_model.safetensors",
    "vision_head_config.json": "diffusion_head/config.json",
    "projector.safetensors": "projector/diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    return golden_models.release_folder("t2i_4x", tmp_path_factory.mktemp("unpacked") / "release")


@pytest.fixture
def release(unpacked, tmp_path):
    """A copy that tests change."""
    return shutil.copytree(unpacked, tmp_path / "release")


@pytest.fixture(scope="module")
def converted(unpacked, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "model"
    convert(str(unpacked), str(out))
    return out


def assert_same(actual, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_same_folder(actual, expected) -> None:
    actual = model_folder.load(actual)
    expected = model_folder.load(expected)
    assert_same(actual.params, expected.params)
    assert dataclasses.replace(actual, params={}) == dataclasses.replace(expected, params={})


def tensors(folder, stem):
    return {
        key: array.read()
        for key, array in safetensors_file.load_shards(folder, stem).tensors.items()
    }


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_a_released_folder_gives_the_recorded_model(name, converted, tmp_path):
    out = converted
    if name != "t2i_4x":
        out = tmp_path / "out"
        convert(str(golden_models.release_folder(name, tmp_path / "release")), str(out))
    folder = model_folder.load(out, expect="text_to_image")
    expected = golden_models.text_to_image(name)
    tokenizer = golden_models.tokenizer("tokenizer")
    assert {array.dtype.name for array in jax.tree.leaves(folder.params)} == {"bfloat16"}
    assert_same(unstack(folder.params["model"]), expected.params)
    assert_same(folder.params["tokenizer"], tokenizer.params)
    # The number of codebooks matters in training only, and is not in this release.
    config = from_dict(TextToImageConfig, folder.config)
    assert config == dataclasses.replace(
        expected.config, tokenizer=dataclasses.replace(tokenizer.config, num_codebooks=1)
    )
    assert folder.metadata["source"] == "release"
    sampler = folder.metadata["sampler"]
    assert (sampler["head_steps"], sampler["guidance_scale"]) == (50, 7.5)

    prompts = PromptTokenizer(out / "text_tokenizer", config.tokens_per_step)
    assert prompts.image_tokens == config.image_tokens
    assert prompts.encode(expected.prompt["prompt"], max_tokens=100) == expected.prompt["cond_ids"]
    assert prompts.unconditional() == expected.prompt["uncond_ids"]


def test_the_diffusers_layout_gives_the_same_model(release, converted, tmp_path, capsys):
    layout = tmp_path / "BitDance-diffusers"
    for file in release.iterdir():
        folder = "text_encoder" if file.name.startswith("model") else "tokenizer"
        target = layout / DIFFUSERS.get(file.name, f"{folder}/{file.name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    flat = json.loads((release / "ae_config.json").read_text())["ddconfig"]
    (layout / "autoencoder" / "config.json").write_text(
        json.dumps({"_class_name": "AutoencoderKL", **flat})
    )
    (layout / "projector" / "config.json").write_text("{}")
    (layout / "model_index.json").write_text("{}")
    convert(str(layout), str(tmp_path / "out"))
    assert "does not fit" not in capsys.readouterr().out
    actual = model_folder.load(tmp_path / "out")
    expected = model_folder.load(converted)
    assert_same(actual.params, expected.params)
    assert (actual.kind, actual.config) == (expected.kind, expected.config)
    assert (tmp_path / "out/text_tokenizer/tokenizer.json").read_bytes() == (
        release / "tokenizer.json"
    ).read_bytes()


def test_export_and_convert_are_bit_exact(release, converted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "SHARD_BYTES", 300_000)
    monkeypatch.setattr(
        sys, "argv", ["convert", str(converted), str(tmp_path / "again"), "--to", "torch"]
    )
    main()
    assert f"{tmp_path / 'again'}: 201 tensors" in capsys.readouterr().out
    for stem in ("model", "vision_head", "projector", "ae"):
        exported = tensors(tmp_path / "again", stem)
        expected = tensors(release, stem)
        assert exported.keys() == expected.keys()
        assert_same(exported, expected)
        assert {array.dtype.name for array in exported.values()} == {"bfloat16"}
    assert len(list((tmp_path / "again").glob("model-*-of-00005.safetensors"))) == 5
    for name in ("config.json", "vision_head_config.json"):
        exported = json.loads((tmp_path / "again" / name).read_text())
        expected = json.loads((release / name).read_text())
        assert exported.items() <= expected.items()

    convert(str(tmp_path / "again"), str(tmp_path / "model"))
    assert_same_folder(tmp_path / "model", converted)


def test_a_release_is_never_replaced(release, converted):
    """It has a config.json, like a model folder."""
    with pytest.raises(UserError, match=str(release)):
        convert(str(release), str(release))
    with pytest.raises(UserError, match=str(release)):
        export.export(str(converted), str(release))
    assert (release / "vision_head.safetensors").is_file()


def test_links_to_other_files_of_this_machine_are_refused(release, tmp_path):
    """A release may have symbolic links to itself or into its Hugging Face cache only."""
    secret = tmp_path / "secret"
    secret.write_text("of this machine")
    (release / "merges.txt").symlink_to(secret)
    with pytest.raises(UserError, match=r"merges\.txt .*secret"):
        convert(str(release), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()

    cached = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    (release / "merges.txt").unlink()
    shutil.copytree(release, cached)
    (cached / "tokenizer.json").rename(blobs / "89ab")
    (cached / "tokenizer.json").symlink_to("../../blobs/89ab")
    convert(str(cached), str(tmp_path / "out"))
    assert (tmp_path / "out/text_tokenizer/tokenizer.json").read_bytes() == (
        blobs / "89ab"
    ).read_bytes()


def test_export_and_convert_a_toy_model(tmp_path):
    """It has unreleased sizes."""
    config = toy_text_to_image.config(tokens_per_step=16)
    config = dataclasses.replace(
        config, head=dataclasses.replace(config.head, head_dim=32, num_blocks=2)
    )
    toy_text_to_image.save(tmp_path / "toy", config, seed=1)
    export.export(str(tmp_path / "toy"), str(tmp_path / "release"))
    convert(str(tmp_path / "release"), str(tmp_path / "again"))
    assert_same_folder(tmp_path / "again", tmp_path / "toy")
    assert from_dict(TextToImageConfig, model_folder.load(tmp_path / "again").config) == config


def test_a_text_to_image_model_is_exported_as_a_folder(converted, tmp_path):
    with pytest.raises(ConfigError, match=r"^out must be a folder for a text-to-image model, got "):
        export.export(str(converted), str(tmp_path / "x.safetensors"))
    assert not any(tmp_path.iterdir())


def test_sizes_of_the_full_model():
    """The shapes of the 64x release give our preset."""
    shapes = {
        prefix + key: tuple(shape)
        for part, prefix in (
            ("llm", ""),
            ("vision_head", "vision_head."),
            ("projector", "projector."),
        )
        for key, shape in golden_models.manifest()[f"BitDance-14B/{part}"].items()
    }
    expected = TextToImageConfig.released("14b_64x")
    prompts = object.__new__(PromptTokenizer)
    prompts.image_tokens = expected.image_tokens
    prompts.tokens_per_step = 64
    head = released_text_to_image.vision_head_record(expected)
    assert released_text_to_image.tokens_per_step(head) == 64
    config = released_text_to_image.text_to_image_config(
        shapes,
        text=released_text_to_image.text_record(expected.text),
        vision_head=head,
        tokenizer=TokenizerConfig.d16c32(),
        prompts=prompts,
    )
    assert config == expected
    abstract = text_to_image.abstract_params(expected)
    assert parameters.release_shapes(abstract, keys.text_to_image(expected)) == shapes
    ae = {key: tuple(shape) for key, shape in golden_models.manifest()["BitDance-14B/ae"].items()}
    assert released_configs.tokenizer_config(ae, {}) == TokenizerConfig.d16c32()


def test_missing_and_truncated_files(release, tmp_path):
    def refuse(match):
        with pytest.raises(UserError, match=match) as error:
            convert(str(release), str(tmp_path / "out"))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()

    def remove(*names):
        for name in names:
            (release / name).rename(tmp_path / name)

    def restore(*names):
        for name in names:
            (tmp_path / name).rename(release / name)

    remove("projector.safetensors", "ae_config.json", "tokenizer.json")
    refuse(r": projector\.safetensors, ae_config\.json, tokenizer\.json$")
    restore("projector.safetensors", "ae_config.json", "tokenizer.json")
    remove("model.safetensors.index.json")
    refuse(r": model\.safetensors\.index\.json$")
    restore("model.safetensors.index.json")
    remove("model-00002-of-00003.safetensors")
    refuse(r"model\.safetensors\.index\.json .*: model-00002-of-00003\.safetensors$")
    restore("model-00002-of-00003.safetensors")
    last = release / "model-00003-of-00003.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    refuse(r"model-00003-of-00003\.safetensors .*truncated")
    shutil.copy(release / "projector.safetensors", last)
    refuse(r"unknown key fc1\.bias; .*; missing key lm_head\.weight$")
    shutil.copy(release / "model-00002-of-00003.safetensors", last)
    refuse(r"model-00003-of-00003\.safetensors .*: model\.layers\.1\.")
    (release / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../x.safetensors"}}'
    )
    refuse(r"index\.json .* \.\./x\.safetensors")
    (release / "model.safetensors.index.json").write_text("[]")
    refuse(r"index\.json .*weight_map")


def test_the_wrong_keys_of_all_parts_are_listed(release, tmp_path):
    for stem, edit in (
        ("projector", lambda state: state.pop("fc2.bias")),
        ("vision_head", lambda state: state.update({"net.extra": state["net.cond_embed.bias"]})),
        (
            "ae",
            lambda state: state.update({"decoder.conv_out.bias": state["encoder.norm_out.bias"]}),
        ),
    ):
        state = safetensors_file.load(release / f"{stem}.safetensors").tensors
        state = {
            key: dataclasses.replace(array, read=lambda values=array.read(): values)
            for key, array in state.items()
        }
        edit(state)
        safetensors_file.save(release / f"{stem}.safetensors", state, {})
    with pytest.raises(UserError) as error:
        convert(str(release), str(tmp_path / "out"))
    assert str(error.value).endswith(
        ": unknown key vision_head.net.extra; missing key projector.fc2.bias;"
        " ae.decoder.conv_out.bias has the shape [64], the model's is [3]"
    )


def test_another_language_model(release, tmp_path):
    record = json.loads((release / "config.json").read_text())
    (release / "config.json").write_text(
        json.dumps(record | {"model_type": "llama", "rope_scaling": {"type": "yarn"}})
    )
    with pytest.raises(UserError, match=r"model_type llama, rope_scaling .*yarn"):
        convert(str(release), str(tmp_path / "out"))


def test_config_files(release, tmp_path, capsys):
    """With the rotary base as later versions of Transformers write it, and P from the queries."""
    record = json.loads((release / "config.json").read_text())
    del record["rope_theta"]
    rope = {"rope_type": "default", "rope_theta": 5e5}
    (release / "config.json").write_text(
        json.dumps(record | {"rope_parameters": rope, "rms_norm_eps": 1e-5, "hidden_size": 64})
    )
    head = json.loads((release / "vision_head_config.json").read_text())
    del head["parallel_num"]
    (release / "vision_head_config.json").write_text(
        json.dumps(head | {"time_shift": 2.0, "time_schedule": "uniform"})
    )
    convert(str(release), str(tmp_path / "out"))
    assert "hidden_size 64, not 128\n" in capsys.readouterr().out
    config = from_dict(TextToImageConfig, model_folder.load(tmp_path / "out").config)
    assert (config.text.rope_base, config.text.norm_eps, config.tokens_per_step) == (5e5, 1e-5, 4)
    assert (config.head.time_shift, config.head.time_distribution) == (2.0, "uniform")


def test_a_prompt_tokenizer_of_another_model(release, tmp_path):
    """One with too few queries, and one with ids outside the vocabulary."""
    (release / "tokenizer_config.json").unlink()
    (release / "tokenizer.json").write_text(toy_text_to_image.tokenizer_json(tokens_per_step=2))
    with pytest.raises(
        UserError,
        match=r": <\|query_2\|>, <\|query_3\|>;",
    ):
        convert(str(release), str(tmp_path / "out"))
    special = json.loads(toy_text_to_image.tokenizer_json(tokens_per_step=4))
    special["model"]["vocab"] |= {f"token{n}": 256 + n for n in range(100)}
    special["added_tokens"] = [
        token | {"id": token["id"] + 100} for token in special["added_tokens"]
    ]
    (release / "tokenizer.json").write_text(json.dumps(special))
    with pytest.raises(UserError, match=r"image_tokens .*426"):
        convert(str(release), str(tmp_path / "out"))


def test_a_folder_without_a_language_model(release, tmp_path, capsys):
    for sign in release_folder.SIGNS:
        (release / sign).unlink()
    convert(str(release), str(tmp_path / "out"))
    assert "no language model" in capsys.readouterr().out
    assert model_folder.load(tmp_path / "out").kind == "tokenizer"


def test_tokenizer_files_of_a_model_folder_are_checked(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "model")
    file = tmp_path / "model/text_tokenizer/tokenizer.json"
    file.write_text(file.read_text().replace("<|res_7|>", "<|res_x|>"))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        model_folder.load(tmp_path / "model")
