"""Released text-to-image folders to model folders and back, with the recorded models of tests/golden."""

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
    safetensors_file,
    sizes,
    text_to_image,
)
from bitdance_jax.convert.convert import convert
from bitdance_jax.errors import UserError
from bitdance_jax.io import model_folder
from bitdance_jax.models import text_to_image as text_to_image_model
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
    """A copy to change."""
    return shutil.copytree(unpacked, tmp_path / "release")


@pytest.fixture(scope="module")
def converted(unpacked, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "model"
    convert(str(unpacked), str(out))
    return out


def assert_same(actual, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def tensors(folder, stem):
    return {
        key: array.read()
        for key, array in safetensors_file.load_shards(folder, stem).tensors.items()
    }


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_a_released_folder_becomes_the_recorded_model(name, converted, tmp_path):
    out = converted
    if name != "t2i_4x":
        out = tmp_path / "out"
        convert(str(golden_models.release_folder(name, tmp_path / "release")), str(out))
    folder = model_folder.load(out, expect="text_to_image")
    expected, tokenizer = golden_models.text_to_image(name), golden_models.tokenizer("tokenizer")
    assert {array.dtype.name for array in jax.tree.leaves(folder.params)} == {"bfloat16"}
    assert_same(unstack(folder.params["model"]), expected.params)
    assert_same(folder.params["tokenizer"], tokenizer.params)
    # The number of codebooks counts in training alone; this release does not tell it.
    config = from_dict(TextToImageConfig, folder.config)
    assert config == dataclasses.replace(
        expected.config, tokenizer=dataclasses.replace(tokenizer.config, num_codebooks=1)
    )
    assert folder.metadata["source"] == "release"
    assert (
        folder.metadata["sampler"]["head_steps"],
        folder.metadata["sampler"]["guidance_scale"],
    ) == (50, 7.5)

    prompts = PromptTokenizer(out / "text_tokenizer", config.tokens_per_step)
    assert prompts.image_tokens == config.image_tokens
    assert prompts.encode(expected.prompt["prompt"], max_tokens=100) == expected.prompt["cond_ids"]
    assert prompts.unconditional() == expected.prompt["uncond_ids"]


def test_the_diffusers_layout_is_the_same_model(release, converted, tmp_path, capsys):
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
    same, first = model_folder.load(tmp_path / "out"), model_folder.load(converted)
    assert_same(same.params, first.params)
    assert (same.kind, same.config) == (first.kind, first.config)
    assert (tmp_path / "out/text_tokenizer/tokenizer.json").read_bytes() == (
        release / "tokenizer.json"
    ).read_bytes()


def test_both_directions_are_bit_exact(release, converted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "SHARD_BYTES", 300_000)
    monkeypatch.setattr(
        sys, "argv", ["convert", str(converted), str(tmp_path / "again"), "--to", "torch"]
    )
    main()
    assert f"{tmp_path / 'again'}: 201 tensors" in capsys.readouterr().out
    for stem in ("model", "vision_head", "projector", "ae"):
        exported, expected = tensors(tmp_path / "again", stem), tensors(release, stem)
        assert exported.keys() == expected.keys()
        assert_same(exported, expected)
        assert {array.dtype.name for array in exported.values()} == {"bfloat16"}
    assert len(list((tmp_path / "again").glob("model-*-of-00005.safetensors"))) == 5
    for name in ("config.json", "vision_head_config.json"):
        ours, theirs = (
            json.loads((folder / name).read_text()) for folder in (tmp_path / "again", release)
        )
        assert ours.items() <= theirs.items()

    convert(str(tmp_path / "again"), str(tmp_path / "model"))
    first, second = model_folder.load(converted), model_folder.load(tmp_path / "model")
    assert_same(second.params, first.params)
    assert (second.kind, second.config, second.metadata) == (
        first.kind,
        first.config,
        first.metadata,
    )


def test_a_release_is_never_replaced(release, converted):
    """It has a config.json, as a model folder has."""
    with pytest.raises(UserError, match="is not a model folder"):
        convert(str(release), str(release))
    with pytest.raises(UserError, match="is there already; give a place for a new folder"):
        export.export(str(converted), str(release))
    assert (release / "vision_head.safetensors").is_file()


def test_files_of_this_machine_are_not_taken_into_the_model(release, tmp_path):
    """A release may hold symbolic links, but only to itself or into the Hugging Face cache that it lies in."""
    secret = tmp_path / "secret"
    secret.write_text("of this machine")
    (release / "merges.txt").symlink_to(secret)
    with pytest.raises(
        UserError, match=r"merges\.txt is a link to .*secret, outside of its folder"
    ):
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


def test_a_toy_model_there_and_back(tmp_path):
    """Sizes that no released model has."""
    config = toy_text_to_image.config(tokens_per_step=16)
    config = dataclasses.replace(
        config, head=dataclasses.replace(config.head, head_dim=32, num_blocks=2)
    )
    toy_text_to_image.save(tmp_path / "toy", config, seed=1)
    export.export(str(tmp_path / "toy"), str(tmp_path / "release"))
    convert(str(tmp_path / "release"), str(tmp_path / "again"))
    first, second = model_folder.load(tmp_path / "toy"), model_folder.load(tmp_path / "again")
    assert (
        from_dict(TextToImageConfig, second.config) == config and second.metadata == first.metadata
    )
    assert_same(second.params, first.params)


def test_sizes_of_the_full_model():
    """The manifest's shapes, the 64x release, are those of our preset; no number is read."""
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
    prompts.image_tokens, prompts.tokens_per_step = expected.image_tokens, 64
    text, head = (
        text_to_image.text_record(expected.text),
        text_to_image.vision_head_record(expected),
    )
    assert text_to_image.tokens_per_step(head) == 64
    assert (
        text_to_image.text_to_image_config(shapes, text, head, TokenizerConfig.d16c32(), prompts)
        == expected
    )
    assert (
        parameters.release_shapes(
            text_to_image_model.abstract_params(expected), keys.text_to_image(expected)
        )
        == shapes
    )
    ae = {key: tuple(shape) for key, shape in golden_models.manifest()["BitDance-14B/ae"].items()}
    assert sizes.tokenizer_config(ae, {}) == TokenizerConfig.d16c32()


def test_what_is_missing_or_cut_is_one_line(release, tmp_path):
    def complaint(match):
        with pytest.raises(UserError, match=match) as error:
            convert(str(release), str(tmp_path / "out"))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()

    def without(*names):
        for name in names:
            (release / name).rename(tmp_path / name)

    def put_back(*names):
        for name in names:
            (tmp_path / name).rename(release / name)

    without("projector.safetensors", "ae_config.json", "tokenizer.json")
    complaint(
        r"not a whole text-to-image model; fetch what is missing: projector\.safetensors, ae_config\.json, tokenizer\.json$"
    )
    put_back("projector.safetensors", "ae_config.json", "tokenizer.json")
    without("model.safetensors.index.json")
    complaint(
        r"not a whole text-to-image model; fetch what is missing: model\.safetensors\.index\.json$"
    )
    put_back("model.safetensors.index.json")
    without("model-00002-of-00003.safetensors")
    complaint(
        r"model\.safetensors\.index\.json names model-00002-of-00003\.safetensors, not to be found in .*; fetch what is missing$"
    )
    put_back("model-00002-of-00003.safetensors")
    whole = (release / "model-00003-of-00003.safetensors").read_bytes()
    (release / "model-00003-of-00003.safetensors").write_bytes(whole[:-1])
    complaint(r"model-00003-of-00003\.safetensors cannot be read; it is cut short or damaged")
    (release / "model-00003-of-00003.safetensors").write_bytes(
        (release / "projector.safetensors").read_bytes()
    )
    complaint(r"unknown key fc1\.bias; .*; missing key lm_head\.weight$")
    shutil.copy(
        release / "model-00002-of-00003.safetensors", release / "model-00003-of-00003.safetensors"
    )
    complaint(
        r"model-00003-of-00003\.safetensors has a second key model\.layers\.1\..*, which another shard has too"
    )
    (release / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../x.safetensors"}}'
    )
    complaint(r"index\.json is damaged: it names \.\./x\.safetensors; fetch it again")
    (release / "model.safetensors.index.json").write_text("[]")
    complaint(r"index\.json cannot be read: Expected object, got array; it must have a weight_map")


def test_every_wrong_key_of_every_part_is_listed(release, tmp_path):
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
        "is not a model that is known here: unknown key vision_head.net.extra; missing key projector.fc2.bias; "
        "ae.decoder.conv_out.bias has the shape [64], the model's is [3]"
    )


def test_another_language_model_is_one_line(release, tmp_path):
    record = json.loads((release / "config.json").read_text())
    (release / "config.json").write_text(
        json.dumps(record | {"model_type": "llama", "rope_scaling": {"type": "yarn"}})
    )
    with pytest.raises(
        UserError,
        match=r"not a plain Qwen3: its config\.json has model_type llama, rope_scaling \{'type': 'yarn'\}",
    ):
        convert(str(release), str(tmp_path / "out"))


def test_what_shapes_do_not_tell_is_in_the_configs(release, tmp_path, capsys):
    """Also as later versions of Transformers write the rotary base; without the head's `parallel_num` the queries tell P."""
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
    assert (
        "does not fit its weights, which count: hidden_size 64, not 128\n"
        in capsys.readouterr().out
    )
    config = from_dict(TextToImageConfig, model_folder.load(tmp_path / "out").config)
    assert (config.text.rope_base, config.text.norm_eps, config.tokens_per_step) == (5e5, 1e-5, 4)
    assert (config.head.time_shift, config.head.time_distribution) == (2.0, "uniform")


def test_a_prompt_tokenizer_of_another_model(release, tmp_path):
    """One with too few queries, and one whose ids lie outside the vocabulary."""
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
    with pytest.raises(UserError, match=r"image_tokens reach id 425, and the vocabulary has 347"):
        convert(str(release), str(tmp_path / "out"))


def test_a_folder_without_a_language_model_gives_its_tokenizer(release, tmp_path, capsys):
    for sign in release_folder.SIGNS:
        (release / sign).unlink()
    convert(str(release), str(tmp_path / "out"))
    assert "has no language model: its tokenizer alone is converted" in capsys.readouterr().out
    assert model_folder.load(tmp_path / "out").kind == "tokenizer"


def test_the_model_folder_s_tokenizer_files_are_checked(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "model")
    file = tmp_path / "model/text_tokenizer/tokenizer.json"
    file.write_text(file.read_text().replace("<|res_7|>", "<|res_x|>"))
    with pytest.raises(UserError, match=r"the model folder is damaged: .*tokenizer\.json"):
        model_folder.load(tmp_path / "model")
