"""Plans of text-to-image sampling: the three programs of a small model, on this machine."""

import dataclasses
import json
import re
import sys
from types import SimpleNamespace

import jax
import pytest
import tiny_models
from flax import traverse_util

from bitdance_jax import TextToImage
from bitdance_jax.cli import plan as command
from bitdance_jax.cli.command_line import run
from bitdance_jax.config import FlowHeadConfig, TokenizerConfig
from bitdance_jax.models.text_to_image import abstract_params
from bitdance_jax.perf.hardware import CHIPS
from bitdance_jax.pipelines import toy_text_to_image
from bitdance_jax.plan import analysis, text_to_image
from bitdance_jax.plan.analysis import DoesNotFit
from bitdance_jax.plan.estimate import Estimate, Memory
from bitdance_jax.plan.text_to_image import find_model
from bitdance_jax.plan.text_to_image_programs import Setting, abstract_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    small = dataclasses.replace(
        toy_text_to_image.config(),
        tokenizer=TokenizerConfig(bits=8, ch=32, ch_mult=(1, 1), num_res_blocks=1, num_codebooks=2),
        head=FlowHeadConfig(width=32, num_blocks=2, num_groups=1, head_dim=16, squash_output=True),
    )
    path = tmp_path_factory.mktemp("models") / "toy"
    toy_text_to_image.save(path, small)
    return path


def plan(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["plan", *map(str, flags)])
    return run(command.main)


def test_the_plan_of_a_batch(monkeypatch, tmp_path, capsys, folder):
    chip = dataclasses.replace(next(chip for chip in CHIPS if chip.name == "h100"), memory=1e9)
    monkeypatch.setattr(analysis, "chip_of", lambda device: chip)
    out = tmp_path / "plan.json"
    flags = "--size 16x8 --batch-size 2 --head-steps 3 --dtype float32 --weights float32 --json"
    assert plan(monkeypatch, folder, *flags.split(), out) == 0
    assert "reading weights, s an image" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["calls"] == [1, 1, 1]
    assert written["images"] == 2
    # Each of 8 patches reads the head's weights four times and all others once.
    params = traverse_util.flatten_dict(abstract_params(find_model(str(folder))), sep="/")
    sizes = {name: leaf.size for name, leaf in params.items()}
    head = sum(
        size for name, size in sizes.items() if re.match(r"head/(?!time_embed|cond_embed)", name)
    )
    once = sum(
        size
        for name, size in sizes.items()
        if not re.match(r"head/|text/(embed_tokens|lm_head)", name) or "cond_embed" in name
    )
    assert written["weight_seconds_an_image"] == pytest.approx(
        8 * 4 * (once + 4 * head) / chip.bandwidth / 2
    )
    begin, advance, decode = written["programs"]
    assert advance["program"] == "8 patches"
    assert decode["program"] == "decoder"
    # Every iteration of loops counts, also if their number is an argument.
    assert begin["flops_per_device"] == begin["model_flops"]
    assert decode["flops_per_device"] > 0
    assert advance["flops_per_device"] == advance["model_flops"]
    serial = [program["estimate"]["bounds"]["serial"] for program in (begin, advance, decode)]
    assert written["seconds_an_image"]["serial"] == pytest.approx(sum(serial) / 2)


def test_a_search_ranks_meshes_and_gives_reasons_for_the_others(monkeypatch, capsys):
    """On four devices, with two rows of one image, "data" can be 1 or 2."""
    seconds = {1: 3.0, 2: 2.0}

    def plan_batch(arguments, config, mesh, decoder):
        if mesh.data == 1 and arguments.weights == "bfloat16":
            raise DoesNotFit("it needs 17.0 GiB")
        memory = Memory(arguments=2**30, outputs=0, aliased=0, temporaries=0, code=0)
        bounds = Estimate(0, 0, 0, 0, 0.0, 0.0, 0.0, seconds[mesh.data], 0.0, None)
        one = SimpleNamespace(memory=memory, estimate=bounds)
        return text_to_image.BatchPlan((one, one, one), (1, 1, 1), 1, 1.0)

    monkeypatch.setattr(text_to_image, "plan_batch", plan_batch)
    monkeypatch.setattr(text_to_image, "make_mesh", lambda config, devices: config)
    config = find_model("14b_64x")
    both = text_to_image.compare(Setting(weights="int8"), config, jax.devices()[:1] * 4)
    assert [batch["name"] for batch in both["batches"]] == [
        "mesh.data=2 mesh.tensor=2",
        "mesh.data=1 mesh.tensor=4",
    ]
    assert "6.00 (6.0 x)" in capsys.readouterr().out.splitlines()[2]
    one = text_to_image.compare(Setting(), config, jax.devices()[:1] * 4)
    assert len(one["batches"]) == 1
    assert one["refused"] == {"mesh.data=1 mesh.tensor=4": "it needs 17.0 GiB"}


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_weights_are_those_of_the_loaded_model(folder, weights):
    model = TextToImage.load(folder, dtype="float32", weights=weights)
    expected = abstract_weights(model.config, model.mesh, jax.numpy.dtype("float32"), weights)

    def describe(tree):
        return {
            jax.tree_util.keystr(path): (x.shape, x.dtype.name, x.sharding)
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }

    loaded = describe(model.params)
    for name, (shape, dtype, sharding) in describe(expected).items():
        assert loaded[name][:2] == (shape, dtype)
        assert loaded[name][2].is_equivalent_to(sharding, len(shape))
    assert loaded.keys() == describe(expected).keys()


@pytest.mark.parametrize("name", ["14b_64x", "BitDance-14B-16x", "14B-64x"])
def test_released_names(name):
    assert find_model(name).tokens_per_step == int(name[-3:-1])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["14b_64x", "--size", "1000x1000"], "multiples of 128"),
        (["14b_64x", "--batch-size", "0"], "--batch-size"),
        (["14b_64x", "--mesh.tensor", "3"], "1 devices"),
        (["14b_64x", "--mesh.tensr", "3"], "--mesh.tensor"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, flags, named):
    assert plan(monkeypatch, *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert named in error


def test_a_folder_of_another_kind(monkeypatch, capsys, tmp_path):
    tiny_models.save_tokenizer(tmp_path / "tokenizer")
    assert plan(monkeypatch, tmp_path / "tokenizer") == 2
    assert "tokenizer" in capsys.readouterr().err
