"""Released files to model folders and back, with the recorded models of tests/golden."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import golden_models
import jax
import numpy as np
import pytest
import released
import safetensors.numpy
import tiny_models
import torch_writer

from bitdance_jax.cli.convert import main
from bitdance_jax.config import ClassConditionalConfig, TokenizerConfig, from_dict, to_dict
from bitdance_jax.convert import keys, parameters, released_configs
from bitdance_jax.convert.convert import convert
from bitdance_jax.convert.export import export
from bitdance_jax.errors import ConfigError, FileError, UserError
from bitdance_jax.io import model_folder, model_lookup
from bitdance_jax.io.model_lookup import EMBEDDED_CLASSES, RunRecord
from bitdance_jax.nn.stack import unstack
from bitdance_jax.tokenizer import autoencoder


def assert_same(actual, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert jax.tree.map(lambda x: x.dtype, actual) == jax.tree.map(lambda x: x.dtype, expected)


def assert_same_folder(actual, expected) -> None:
    actual = model_folder.load(actual)
    expected = model_folder.load(expected)
    assert_same(actual.params, expected.params)
    assert dataclasses.replace(actual, params={}) == dataclasses.replace(expected, params={})


@pytest.fixture(scope="module")
def pt(tmp_path_factory):
    return released.save_pt(tmp_path_factory.mktemp("released") / "weights.pt", "imagenet_4x")


@pytest.fixture(scope="module")
def converted(pt, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "model"
    convert(str(pt), str(out))
    return out


@pytest.fixture(scope="module")
def ae_pt(tmp_path_factory):
    """Another tokenizer than the one in `pt`, with the discriminator of its training."""
    weights = {key: array - 1 for key, array in golden_models.read("tokenizer/weights").items()}
    state = {
        "state_dict": weights | {"loss.discriminator.weight": np.zeros(3, np.float32)},
        "global_step": 400_000,
        "optimizer": {},
    }
    return torch_writer.save(tmp_path_factory.mktemp("ae") / "ae_d16c8.pt", state)


def test_a_released_file_gives_the_recorded_model(converted):
    """Its config and its parameters are those of the golden tests."""
    folder = model_folder.load(converted, expect="class_conditional")
    expected = golden_models.class_conditional("imagenet_4x")
    tokenizer = golden_models.tokenizer("tokenizer")
    assert_same(unstack(folder.params["model"]), expected.params)
    assert_same(folder.params["tokenizer"], tokenizer.params)
    config = from_dict(ClassConditionalConfig, folder.config)
    assert config == dataclasses.replace(
        expected.config, tokenizer=dataclasses.replace(tokenizer.config, num_codebooks=2)
    )
    assert folder.metadata == {"class_names": None, "weights": "ema", "source": "weights.pt"}


@pytest.mark.parametrize("name", ["imagenet_1x", "imagenet_16x"])
def test_other_patch_sizes_and_no_arguments(name, tmp_path):
    """Without the release's arguments the sizes come from the shapes."""
    convert(str(released.save_pt(tmp_path / "x.pt", name, args={})), str(tmp_path / "out"))
    folder = model_folder.load(tmp_path / "out")
    expected = golden_models.class_conditional(name)
    assert_same(unstack(folder.params["model"]), expected.params)
    config = from_dict(ClassConditionalConfig, folder.config)
    for field in (
        "transformer",
        "head",
        "num_classes",
        "image_size",
        "tokens_per_step",
        "class_tokens",
        "order",
    ):
        assert getattr(config, field) == getattr(expected.config, field)


def test_recorded_times_of_the_head(tmp_path, capsys):
    """They survive an export, with and without our own metadata in the file."""
    times = {"time_schedule": "uniform", "time_shift": 2.5, "P_mean": -0.25, "P_std": 1.5}
    args = released.arguments("imagenet_4x") | times
    convert(
        str(released.save_pt(tmp_path / "x.pt", "imagenet_4x", args=args)), str(tmp_path / "out")
    )
    assert "does not fit" not in capsys.readouterr().out
    expected = {
        "time_distribution": "uniform",
        "time_shift": 2.5,
        "time_mean": -0.25,
        "time_std": 1.5,
    }
    head = model_folder.load(tmp_path / "out").config["head"]
    assert expected.items() <= head.items()

    export(str(tmp_path / "out"), str(tmp_path / "y.safetensors"))
    assert times.items() <= json.loads((tmp_path / "y_config.json").read_text()).items()
    for name in ("again", "without metadata"):
        convert(str(tmp_path / "y.safetensors"), str(tmp_path / name))
        assert model_folder.load(tmp_path / name).config["head"] == head
        safetensors.numpy.save_file(
            safetensors.numpy.load_file(tmp_path / "y.safetensors"), tmp_path / "y.safetensors"
        )


def test_unknown_times_of_the_head(tmp_path):
    args = released.arguments("imagenet_4x")
    for wrong, message in (
        ({"time_schedule": "cosmap"}, "time_schedule .*'cosmap'"),
        ({"time_shift": 0}, "time_shift"),
    ):
        with pytest.raises(UserError, match=message):
            convert(
                str(released.save_pt(tmp_path / "x.pt", "imagenet_4x", args=args | wrong)),
                str(tmp_path / "out"),
            )


def test_tokenizer_only(pt, converted, ae_pt, tmp_path):
    """Of a .pt, and of a file that `export` wrote."""
    convert(str(pt), str(tmp_path / "a"), tokenizer_only=True)
    export(str(converted), str(tmp_path / "model.safetensors"))
    convert(str(tmp_path / "model.safetensors"), str(tmp_path / "b"), tokenizer_only=True)
    for name, source in (("a", "weights.pt"), ("b", "model.safetensors")):
        folder = model_folder.load(tmp_path / name, expect="tokenizer")
        assert folder.metadata == {"source": source}
        assert folder.config == model_folder.load(converted).config["tokenizer"]
        assert_same(folder.params, golden_models.tokenizer("tokenizer").params)
    convert(str(ae_pt), str(tmp_path / "c"), tokenizer_only=True)  # It has nothing else.
    assert model_folder.load(tmp_path / "c").kind == "tokenizer"
    with pytest.raises(ConfigError, match="tokenizer_only"):
        convert(str(pt), str(tmp_path / "d"), tokenizer=str(ae_pt), tokenizer_only=True)


def test_notes_on_omitted_weights(tmp_path, capsys):
    """Averaged weights of a Lightning file."""
    weights = golden_models.read("tokenizer/weights")
    averaged = {f"model_ema.{key.replace('.', '')}": array + 1 for key, array in weights.items()}
    torch_writer.save(
        tmp_path / "x.ckpt",
        {"state_dict": weights | averaged | {"loss.weight": np.zeros(3, np.float32)}},
    )
    convert(str(tmp_path / "x.ckpt"), str(tmp_path / "a"))
    output = capsys.readouterr().out
    assert "averaged" in output
    assert "loss.weight" in output
    raw = golden_models.tokenizer("tokenizer").params
    assert_same(
        model_folder.load(tmp_path / "a").params, jax.tree.map(lambda array: array + 1, raw)
    )
    convert(str(tmp_path / "x.ckpt"), str(tmp_path / "raw"), weights="model")
    assert_same(model_folder.load(tmp_path / "raw").params, raw)


def save_diffusers(folder, **changes):
    """The golden class-conditional model in the diffusers layout, its head's times as published."""
    config = {
        "_class_name": "BitDanceTransformer",
        "architecture": "BitDance-B-4x",
        "parallel_num": 4,
        "resolution": 128,
        "latent_dim": 8,
        "parallel_mode": "patch",
        "time_schedule": "logit_normal",
        "time_shift": 1.0,
        "p_mean": 0.0,
        "p_std": 1.0,
    }
    parts = {
        "transformer": (golden_models.read("imagenet_4x/weights"), config | changes),
        "autoencoder": (golden_models.read("tokenizer/weights"), released.arguments("tokenizer")),
    }
    for name, (tensors, record) in parts.items():
        (folder / name).mkdir(parents=True)
        file = folder / name / "diffusion_pytorch_model.safetensors"
        tensors = {key: np.ascontiguousarray(array) for key, array in tensors.items()}
        safetensors.numpy.save_file(tensors, file)
        (folder / name / "config.json").write_text(json.dumps(record))
    (folder / "model_index.json").write_text("{}")
    return folder


def test_a_class_conditional_model_in_the_diffusers_layout(converted, tmp_path, capsys):
    """It is the model of the .pt, with the paper's times of the head."""
    source = save_diffusers(tmp_path / "B_4x")
    convert(str(source), str(tmp_path / "out"))
    output = capsys.readouterr().out
    assert "p_mean 0 and p_std 1" in output and "does not fit" not in output
    ours = model_folder.load(tmp_path / "out", expect="class_conditional")
    pt = model_folder.load(converted)
    assert_same(ours.params, pt.params)
    # The layout does not record what only training uses.
    config = from_dict(ClassConditionalConfig, ours.config)
    expected = from_dict(ClassConditionalConfig, pt.config)
    assert config == dataclasses.replace(expected, bit_flip_rate=0.1, head_repeats=4)
    assert ours.metadata["source"] == "B_4x"

    times = save_diffusers(tmp_path / "tuned", p_mean=-0.5, p_std=1.25, time_shift=2.0)
    convert(str(times), str(tmp_path / "tuned_out"))
    assert "note" not in capsys.readouterr().out
    head = from_dict(ClassConditionalConfig, model_folder.load(tmp_path / "tuned_out").config).head
    assert (head.time_mean, head.time_std, head.time_shift) == (-0.5, 1.25, 2.0)


def test_an_incomplete_class_conditional_diffusers_folder(converted, ae_pt, tmp_path):
    source = save_diffusers(tmp_path / "model")
    shutil.rmtree(source / "autoencoder")
    with pytest.raises(ConfigError, match="contains no tokenizer") as error:
        convert(str(source), str(tmp_path / "out"))
    assert error.value.field == "tokenizer"
    convert(str(source), str(tmp_path / "out"), tokenizer=str(ae_pt))
    assert model_folder.load(tmp_path / "out").kind == "class_conditional"

    (source / "transformer" / "config.json").unlink()
    (source / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileError) as missing:
        convert(str(source), str(tmp_path / "other"))
    for name in ("diffusion_pytorch_model.safetensors", "config.json"):
        assert f"transformer/{name}" in str(missing.value)


# Sizes of WeTok's published tokenizers at full size: ch_mult, bits, decoder.
WETOK = {
    "compression 24": ((1, 2, 2, 4), 64, "plain"),
    "compression 48, ImageNet 8x": ((1, 2, 2, 4), 32, "plain"),
    "compression 192, ImageNet 16x": ((1, 1, 2, 2, 4), 32, "plain"),
    "compression 768": ((1, 1, 2, 2, 4, 8), 32, "gan"),
}


@pytest.mark.parametrize(("ch_mult", "bits", "decoder"), WETOK.values(), ids=WETOK)
def test_published_sizes_of_wetok(ch_mult, bits, decoder):
    """From the shapes alone; the groups of bits are WeTok's."""
    config = TokenizerConfig(
        bits=bits, ch=256, ch_mult=ch_mult, decoder=decoder, num_codebooks=bits // 8
    )
    abstract = autoencoder.abstract_params(config)
    shapes = parameters.release_shapes(abstract, keys.tokenizer(config))
    assert released_configs.tokenizer_config(shapes, {}) == config
    assert 3 * 2 * (8 * config.downsampling**2) // (2 * bits) in (24, 48, 192, 768)


def test_a_lightning_file_of_wetok(tmp_path, capsys):
    """Downsampling 8 and 16 bits, with everything that such a file holds besides the tokenizer."""
    config = TokenizerConfig(bits=16, ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1)
    config = dataclasses.replace(config, num_codebooks=2)
    shapes = parameters.release_shapes(autoencoder.abstract_params(config), keys.tokenizer(config))
    rng = np.random.default_rng(0)
    weights = {key: rng.standard_normal(x).astype(np.float32) for key, x in shapes.items()}
    averaged = {f"model_ema.{key.replace('.', '')}": x + 1 for key, x in weights.items()}
    others = {
        "model_ema.decay": np.array(0.999, np.float32),
        "model_ema.num_updates": np.array(7, np.int32),
        "quantize.codebook": np.zeros((2, 2), np.float32),
        "loss.discriminator.main.0.weight": np.zeros((8, 3, 4, 4), np.float32),
        "loss.perceptual_loss.lin0.model.1.weight": np.zeros((1, 64, 1, 1), np.float32),
    }
    content = {
        "epoch": 24,
        "global_step": 1,
        "pytorch-lightning_version": "2.2.0",
        "state_dict": weights | averaged | others,
        "loops": {},
        "callbacks": {},
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "lr_schedulers": [],
    }
    file = torch_writer.save(tmp_path / "wetok.ckpt", content)
    convert(str(file), str(tmp_path / "out"))
    output = capsys.readouterr().out
    assert "averaged weights" in output and "quantize.codebook" in output
    folder = model_folder.load(tmp_path / "out", expect="tokenizer")
    assert from_dict(TokenizerConfig, folder.config) == config
    kernel = folder.params["encoder"]["conv_in"]["kernel"]
    np.testing.assert_array_equal(
        kernel, weights["encoder.conv_in.weight"].transpose(2, 3, 1, 0) + 1
    )


def test_raw_weights_and_another_tokenizer(pt, ae_pt, converted, tmp_path, capsys):
    convert(str(pt), str(tmp_path / "out"), weights="model", tokenizer=str(ae_pt))
    folder = model_folder.load(tmp_path / "out")
    ema = model_folder.load(converted)
    assert folder.metadata["weights"] == "model"
    assert_same(folder.params["model"], jax.tree.map(lambda a: a + 1, ema.params["model"]))
    assert_same(folder.params["tokenizer"], jax.tree.map(lambda a: a - 1, ema.params["tokenizer"]))


def test_export_and_convert_are_bit_exact(pt, converted, tmp_path):
    export(str(converted), str(tmp_path / "model.safetensors"))
    exported = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    state = released.state_dict("imagenet_4x")
    assert exported.keys() == state.keys()
    assert_same(exported, state)

    convert(str(tmp_path / "model.safetensors"), str(tmp_path / "again"))
    assert_same_folder(tmp_path / "again", converted)


def test_a_trained_model_keeps_its_config_and_class_names(tmp_path):
    """Unreleased sizes, and an ablation that shapes do not determine, in bfloat16."""
    config = dataclasses.replace(tiny_models.MODEL, order="token", mask="causal")
    params = {
        "model": tiny_models.model_params(config),
        "tokenizer": tiny_models.tokenizer_params(),
    }
    params = jax.tree.map(lambda a: np.asarray(a, jax.numpy.bfloat16), params)
    names = {"class_names": [f"class {i}" for i in range(9)]}
    model_folder.save(
        tmp_path / "trained",
        kind="class_conditional",
        config=to_dict(config),
        params=params,
        metadata=names,
    )
    export(str(tmp_path / "trained"), str(tmp_path / "trained.safetensors"))
    convert(str(tmp_path / "trained.safetensors"), str(tmp_path / "again"))
    again = model_folder.load(tmp_path / "again")
    assert from_dict(ClassConditionalConfig, again.config) == config
    assert again.metadata == names
    assert_same(again.params, params)


def test_tokenizer_files(ae_pt, tmp_path, capsys):
    """ae_*.pt, .safetensors with its config, and the diffusers layout are the same tokenizer."""
    convert(str(ae_pt), str(tmp_path / "a"))
    assert "loss.discriminator.weight" in capsys.readouterr().out
    export(str(tmp_path / "a"), str(tmp_path / "ae_d16c8.safetensors"))
    weights = safetensors.numpy.load_file(tmp_path / "ae_d16c8.safetensors")
    assert_same(
        weights, {key: array - 1 for key, array in golden_models.read("tokenizer/weights").items()}
    )

    # As released, without our metadata: the config beside it has the number of codebooks.
    safetensors.numpy.save_file(weights, tmp_path / "ae_d16c8.safetensors")
    record = json.loads((tmp_path / "ae_d16c8_config.json").read_text())
    assert record == released.arguments("tokenizer") | {"num_codebooks": 1}
    (tmp_path / "ae_d16c8_config.json").write_text(json.dumps(record | {"num_codebooks": 2}))
    convert(str(tmp_path / "ae_d16c8.safetensors"), str(tmp_path / "b"))

    (tmp_path / "t2i" / "autoencoder").mkdir(parents=True)
    shutil.copy(
        tmp_path / "ae_d16c8.safetensors",
        tmp_path / "t2i" / "autoencoder" / "diffusion_pytorch_model.safetensors",
    )
    (tmp_path / "t2i" / "autoencoder" / "config.json").write_text(
        json.dumps(record["ddconfig"] | {"_class_name": "Autoencoder"})
    )
    capsys.readouterr()
    convert(str(tmp_path / "t2i"), str(tmp_path / "c"))
    output = capsys.readouterr().out
    assert "only its tokenizer is converted" in output
    assert "does not fit" not in output

    folders = [model_folder.load(tmp_path / name, expect="tokenizer") for name in "abc"]
    for folder in folders[1:]:
        assert_same(folder.params, folders[0].params)
    assert [folder.config["num_codebooks"] for folder in folders] == [1, 2, 1]
    model_folder.check_shapes(
        "a",
        folders[0].params,
        autoencoder.abstract_params(golden_models.tokenizer("tokenizer").config),
    )


def test_gan_tokenizer(tmp_path):
    params = tiny_models.tokenizer_params(tiny_models.GAN_TOKENIZER)
    config = to_dict(tiny_models.GAN_TOKENIZER)
    model_folder.save(tmp_path / "gan", kind="tokenizer", config=config, params=params, metadata={})
    export(str(tmp_path / "gan"), str(tmp_path / "gan.safetensors"))
    safetensors.numpy.save_file(
        safetensors.numpy.load_file(tmp_path / "gan.safetensors"), tmp_path / "gan.safetensors"
    )
    convert(str(tmp_path / "gan.safetensors"), str(tmp_path / "again"))
    again = model_folder.load(tmp_path / "again")
    assert again.config == json.loads(json.dumps(config))
    assert_same(again.params, jax.tree.map(np.asarray, params))


def test_all_wrong_keys_are_listed_and_nothing_is_written(tmp_path):
    state = released.state_dict("imagenet_4x")
    del state["layers.1.attention.wo.weight"]
    del state["vae.encoder.norm_out.bias"]
    norm = "head.net.res_blocks.0.norm"
    state[f"{norm}.weight"] = state[f"{norm}2.weight"]  # the name in 1x models
    state["freqs_cis"] = np.zeros(3, np.float32)
    state["vae.discriminator.weight"] = np.zeros(3, np.float32)
    state["layers.0.attention.wqkv.weight"] = state["layers.0.attention.wqkv.weight"].T
    state["vae.decoder.conv_out.bias"] = np.zeros(4, np.float32)
    with pytest.raises(UserError) as error:
        convert(
            str(released.save_pt(tmp_path / "x.pt", "imagenet_4x", ema=state)),
            str(tmp_path / "out"),
        )
    message = str(error.value)
    for problem in (
        "missing key layers.1.attention.wo.weight",
        "missing key vae.encoder.norm_out.bias",
        "unknown key head.net.res_blocks.0.norm.weight",
        "unknown key freqs_cis",
        "unknown key vae.discriminator.weight",
        "layers.0.attention.wqkv.weight has the shape [128, 384], the model's is [384, 128]",
        "vae.decoder.conv_out.bias has the shape [4], the model's is [3]",
    ):
        assert problem in message
    assert message.count("key ") == 5
    assert "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_duplicate_keys_of_a_safetensors_file(tmp_path):
    a = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    b = b'"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}'
    header = b"{" + b",".join([a, b, a, b]) + b"}"
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match="a, b"):
        convert(str(tmp_path / "x.safetensors"), str(tmp_path / "out"))


def test_arguments_that_contradict_the_weights(tmp_path, capsys):
    """The shapes are used; the number of heads, which they do not determine, is recorded."""
    args = released.arguments("imagenet_4x") | {
        "n_layer": 24,
        "n_head": 4,
        "parallel_mode": "standard",
    }
    convert(
        str(released.save_pt(tmp_path / "x.pt", "imagenet_4x", args=args)), str(tmp_path / "out")
    )
    assert "n_layer 24, not 2\n" in capsys.readouterr().out
    config = model_folder.load(tmp_path / "out").config
    assert (
        config["transformer"]["num_layers"],
        config["transformer"]["num_heads"],
        config["order"],
    ) == (2, 4, "token")


def test_only_model_folders_are_replaced(ae_pt, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.png").touch()
    for out in (tmp_path / "images", ae_pt):
        with pytest.raises(UserError, match=str(out)):
            convert(str(ae_pt), str(out))
    assert (tmp_path / "images" / "mine.png").exists()


def test_bad_sources(pt, ae_pt, converted, tmp_path):
    def refuse(source, match, **arguments):
        with pytest.raises(UserError, match=match):
            convert(str(source), str(tmp_path / "out"), **arguments)

    without = {
        key: array
        for key, array in released.state_dict("imagenet_4x").items()
        if not key.startswith("vae.")
    }
    refuse(
        released.save_pt(tmp_path / "a.pt", "imagenet_4x", ema=without),
        r"a\.pt .*tokenizer=",
    )
    refuse(pt, "tokenizer .* is a class-conditional model", tokenizer=str(pt))
    refuse(ae_pt, "is a tokenizer", tokenizer=str(ae_pt))
    refuse(torch_writer.save(tmp_path / "b.pt", {"model": {}}), "weights='model'")
    refuse(torch_writer.save(tmp_path / "c.pt", [1]), r"c\.pt .*list")
    refuse(torch_writer.save(tmp_path / "d.pt", {"state_dict": {"a": 1}}), ": a$")
    integers = {
        key: np.zeros(array.shape, np.int64)
        for key, array in released.state_dict("imagenet_4x").items()
    }
    refuse(
        torch_writer.save(tmp_path / "f.pt", {"ema": integers}),
        r"norm\.weight .*int64",
    )
    refuse("/dev/zero", "/dev/zero")
    (tmp_path / "pointer.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    refuse(tmp_path / "pointer.safetensors", "git lfs pull")
    refuse(
        torch_writer.save(tmp_path / "e.pt", {"a": np.zeros(1)}),
        r"e\.pt .*: a$",
    )
    (tmp_path / "truncated.safetensors").write_bytes(safetensors.numpy.save(without)[:10_000_00])
    refuse(tmp_path / "truncated.safetensors", "truncated or damaged")
    (tmp_path / "empty.pt").touch()
    refuse(tmp_path / "empty.pt", r"empty\.pt")
    refuse(converted, "to='torch'")
    refuse(tmp_path, r": a\.pt, b\.pt")
    with pytest.raises(UserError, match=r"out .*safetensors"):
        export(str(converted), str(tmp_path / "model.pt"))
    assert not (tmp_path / "out").exists()


def test_damage_found_while_converting(pt, tmp_path):
    data = bytearray(pt.read_bytes())
    data[len(data) // 3] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(UserError, match=r"x\.pt .*data/\d+ is damaged"):
        convert(str(tmp_path / "x.pt"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_command(ae_pt, tmp_path, monkeypatch, capsys):
    def command(*flags):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, flags)])
        main()

    command(ae_pt, tmp_path / "t")
    with pytest.raises(UserError, match="holds a model already"):
        command(ae_pt, tmp_path / "t")
    command(ae_pt, tmp_path / "t", "--force")
    command(tmp_path / "t", tmp_path / "t.safetensors", "--to", "torch")
    with pytest.raises(UserError, match=r"t\.safetensors"):
        command(tmp_path / "t", tmp_path / "t.safetensors", "--to", "torch")
    (tmp_path / "t.safetensors").unlink()
    with pytest.raises(UserError, match=r"t_config\.json"):
        command(tmp_path / "t", tmp_path / "t.safetensors", "--to", "torch")
    command(tmp_path / "t", tmp_path / "t.safetensors", "--to", "torch", "--force")
    output = capsys.readouterr().out
    assert f"{tmp_path / 't'}: tokenizer model, 2.98MB of weights from ae_d16c8.pt\n" in output
    assert f"{tmp_path / 't.safetensors'}: 121 tensors, 2.98MB\n" in output
    with pytest.raises(UserError, match="weights"):
        command(tmp_path / "t", tmp_path / "u.safetensors", "--to", "torch", "--weights", "model")


def test_export_of_a_run(tmp_path):
    """Of the embedded model, and of a run that ended with it."""
    run = tmp_path / "run"
    folder = model_lookup.locate(EMBEDDED_CLASSES)
    saved = model_folder.read_config(folder)
    shutil.copytree(folder, run / "model")
    RunRecord(saved.kind, saved.config, saved.metadata).write(run)
    for name in (EMBEDDED_CLASSES, str(run)):
        export(name, str(tmp_path / f"{Path(name).name}.safetensors"))
    exported = [
        (tmp_path / f"{name}.safetensors").read_bytes() for name in ("run", "emoji_classes")
    ]
    assert exported[0] == exported[1]
    (run / "checkpoints" / "9000").mkdir(parents=True)
    with pytest.raises(FileError, match="not finished"):
        export(str(run), str(tmp_path / "unfinished.safetensors"))
