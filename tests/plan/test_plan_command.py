import dataclasses
import functools
import json
import sys

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bitdance_jax.cli import plan as command
from bitdance_jax.cli.command_line import run
from bitdance_jax.cli.config_file import load_config
from bitdance_jax.config import MeshConfig
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.errors import UserError
from bitdance_jax.perf.hardware import CHIPS
from bitdance_jax.plan import analysis, report, search
from bitdance_jax.plan.analysis import DoesNotFit, make_plan, resident_bytes
from bitdance_jax.plan.programs import Program
from bitdance_jax.plan.search import Variant


TINY = """--data.batch-size 2 --model.image-size 8 --model.tokenizer.ch-mult 1 1
--model.transformer.num-layers 2 --model.transformer.dim 32 --model.transformer.num-heads 2
--model.head.width 32 --model.head.num-blocks 1 --model.head-repeats 2 --preview.head-steps 2
--run.compute-dtype float32""".split()


@pytest.fixture(scope="module")
def config():
    default = load_config("emoji_4x")[0]
    return command.parse(type(default), TINY, default)


def plan(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["plan", *flags])
    return run(command.main)


@pytest.fixture
def known_chip(monkeypatch):
    """The CPU as a known chip."""
    chip = dataclasses.replace(next(chip for chip in CHIPS if chip.name == "h100"), memory=1e9)
    monkeypatch.setattr(analysis, "chip_of", lambda device: chip)
    monkeypatch.setattr(search, "chip_of", lambda device: chip)
    return chip


def test_a_training_step_on_this_machine(monkeypatch, tmp_path, capsys, known_chip):
    out = tmp_path / "plan.json"
    assert plan(monkeypatch, "configs/emoji_4x.py", *TINY, "--json", str(out), "--top", "3") == 0
    printed = capsys.readouterr().out
    assert "training step, 2 images, 1 x cpu, mesh data 1 x fsdp 1 x tensor 1" in printed
    assert "model FLOP utilisation" in printed
    assert "| backward transformer/layers/" in printed
    written = json.loads(out.read_text())["plan"]
    # Without rematerialization nothing is computed twice.
    assert written["flops_per_device"] == written["model_flops"] > 0
    bounds = written["estimate"]["bounds"]
    memory = written["memory"]
    used = sum(memory[name] for name in ("arguments", "outputs", "temporaries", "code"))
    assert memory["total"] == used - memory["aliased"]
    assert memory["aliased"] > 0.9 * memory["outputs"]  # The state is donated.
    assert written["images_per_second"]["serial"] == pytest.approx(2 / bounds["serial"])
    utilisation = written["model_flops"] / bounds["serial"] / known_chip.flops
    assert written["model_flop_utilisation"]["serial"] == pytest.approx(utilisation)
    assert len(written["findings"]["Kernels"]) == 3


def test_a_sampler_on_an_unknown_chip(monkeypatch, capsys):
    # As on TPUs, and there the parts of a jitted function must have none.
    for module in ("sampling.compiled", "pipelines.programs"):
        path = f"bitdance_jax.{module}.compiler_options"
        monkeypatch.setattr(path, lambda mesh: {"xla_embed_ir_in_executable": "true"})
    flags = ["--sample", "--per-device", "2", "--dtype", "float32"]
    assert plan(monkeypatch, "configs/emoji_4x.py", *TINY, *flags) == 0
    printed = capsys.readouterr().out
    assert "sampling, 2 images, 1 x cpu" in printed
    assert "times the model's" in printed
    assert "no times" in printed
    assert "model FLOP utilisation" not in printed


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "give a config first"),
        (["configs/none.py"], "no config file configs/none.py"),
        (
            ["configs/emoji_4x.py", "--topology", "v5e:99999x99999"],
            "'v5e:99999x99999'",
        ),
        (["configs/emoji_4x.py", "--topology", "v5p:2x0x2"], "'v5p:2x0x2'"),
        (
            ["configs/emoji_4x.py", "--topology", "v9:2x2"],
            "'v9:2x2'",
        ),
        (["configs/emoji_4x.py", "--mesh.fsdp", "3"], "1 devices"),
        (["configs/emoji_4x.py", "--top", "few"], "invalid"),
        (["configs/emoji_4x.py", "--mesh.fsd", "3"], "--mesh.fsdp?"),
        (
            ["configs/emoji_tokenizer.py", "--sample"],
            "--sample",
        ),
        (["configs/emoji_4x.py", "--data.batch-size", "9", "--run.accumulate", "2"], "multiple of"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, flags, named):
    assert plan(monkeypatch, *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert named in error


def test_a_topology_without_the_compiler(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert plan(monkeypatch, "configs/emoji_4x.py", "--topology", "v5e:2x2") == 2
    assert "pip install libtpu" in capsys.readouterr().err


def test_own_flags_apart_from_the_configs():
    flags = [
        "--search",
        "--mesh.fsdp",
        "2",
        "--batch_sizes",
        "8",
        "16",
        "--run.remat=dots",
        "--json=x",
        "-h",
    ]
    fields = [field.name for field in dataclasses.fields(command.Arguments)]
    assert command.split(flags, [*fields, "help"]) == (
        ["--search", "--batch_sizes", "8", "16", "--json=x", "-h"],
        ["--mesh.fsdp", "2", "--run.remat=dots"],
    )


def toy_program(images):
    """A product of two arrays of a megabyte."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    argument = jax.ShapeDtypeStruct(
        (512, 512), "float32", sharding=NamedSharding(mesh, PartitionSpec())
    )
    return Program("toy", jax.jit(lambda x: x @ x), (argument,), mesh, images, 2 * 512**3)


def test_a_program_that_exceeds_a_device(known_chip, monkeypatch):
    program = toy_program(1)
    assert resident_bytes(program) == 2**20
    assert make_plan(program).memory.total >= 2 * 2**20
    monkeypatch.setattr(
        analysis, "chip_of", lambda device: dataclasses.replace(known_chip, memory=1.5 * 2**20)
    )
    with pytest.raises(DoesNotFit, match=r"it needs .* GiB"):
        make_plan(program)


def test_a_search_continues_with_the_variant_found_and_ranks(known_chip):
    tried = []
    images = {"slow": 1, "fast": 8, "slower": 4}

    def make(name):
        tried.append(name)
        if name.startswith("large"):
            raise DoesNotFit("too large")
        if name == "impossible":
            raise UserError("cannot be sharded")
        return toy_program(images.get(name, 2))

    def variants(*names):
        return [
            Variant(name, functools.partial(make, name), last_resort=name == "small")
            for name in names
        ]

    families = [
        [
            variants("large", "slow", "fast", "slower", "never"),
            variants("never", "never", "second", "never"),
        ],
        [variants("impossible", "never"), variants("large 2"), variants("never")],
        [variants("third", "small"), variants("large 3", "small"), variants("never", "small")],
    ]
    plans, refused = search.search(families)
    assert tried == [
        *("large", "slow", "fast", "slower", "second"),
        *("impossible", "large 2"),
        *("third", "large 3", "small", "small"),
    ]
    assert {name for name, _ in plans} == {"slow", "fast", "slower", "second", "third", "small"}
    speeds = [plan.images_per_second(plan.estimate.expected) for _, plan in plans]
    assert plans[0][0] == "fast"
    assert speeds == sorted(speeds, reverse=True)
    assert refused == [
        ("large", "too large"),
        ("impossible", "cannot be sharded"),
        ("large 2", "too large"),
        ("large 3", "too large"),
    ]
    assert [line.split("|")[1].strip() for line in report.ranking(plans)[2:]] == [
        name for name, _ in plans
    ]


def test_training_candidates(config):
    """Meshes from the least to the most memory, their variants from the most to the least."""
    families = search.training_candidates(
        config, jax.devices()[:1] * 8, [6, 16], [1, 2, 4, 8], [1, 2, 3]
    )
    names = [[[variant.name for variant in variants] for variants in family] for family in families]
    assert [len(family) for family in names] == [4, 3, 4, 3]  # 3 does not divide 8
    assert [variants[0] for variants in names[1]] == [
        f"data {4 // f} fsdp {f} tensor 2, batch 6, remat none" for f in (4, 2, 1)
    ]
    assert [name.split("remat ")[1] for name in names[0][0]] == [
        "none",
        "dots",
        "nothing",
        "nothing, accumulate 2",
    ]
    assert len(names[2][0]) == 6


def test_a_state_that_cannot_fit_is_not_compiled(known_chip, monkeypatch):
    monkeypatch.setattr(
        search, "chip_of", lambda device: dataclasses.replace(known_chip, memory=1e6)
    )
    monkeypatch.setattr(search, "make_plan", lambda program: pytest.fail("compiled"))
    plans, ((_, reason),) = search.search([[[Variant("one", lambda: toy_program(1))]]])
    assert plans == []
    assert "arguments alone" in reason


def test_sampling_candidates():
    (family,) = search.sampling_candidates(toy_program, 48)
    assert [variant.name for (variant,) in family] == [
        f"{count} images a device" for count in (8, 16, 32, 48)
    ]
    assert family[1][0].make().images == 16
