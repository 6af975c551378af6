"""Compiles the training step of a config, or its sampler, for devices that need not be there, and reports what it needs and how it runs:

    python -m bitdance_jax.plan configs/imagenet_h_1x.py --topology v5p:4x4x4 --mesh.fsdp 16
    python -m bitdance_jax.plan configs/imagenet_b_1x.py --topology v5e:2x4 --sample --per-device 64
    python -m bitdance_jax.plan configs/imagenet_l_1x.py --topology v5e:4x4 --search --json plans.json
    python -m bitdance_jax.plan 14b_64x --topology v5e:2x4 --size 1024x1024 --batch-size 4 --search

In the last, a released text-to-image model, or the folder of one, takes the place of a config: `--help` after it lists its flags.
A topology needs the TPU compiler (`pip install libtpu`) and no TPU; without one the plan is for this machine's devices. Every value of the
config is a flag too, as for train.py. `bitdance_jax/plan/estimate.py` says what the times assume.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from bitdance_jax.cli.command_line import Flags, parse, run
from bitdance_jax.cli.config_file import load_config
from bitdance_jax.config import TextToImageConfig
from bitdance_jax.config.plain import BatchSize, Natural, PathName, Size
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.errors import UserError
from bitdance_jax.io import paths
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.io.paths import check_suffix
from bitdance_jax.plan import report, search, text_to_image
from bitdance_jax.plan.analysis import make_plan
from bitdance_jax.plan.devices import find_devices
from bitdance_jax.plan.programs import Program, sampling, training_step
from bitdance_jax.train.class_conditional_training import ClassConditionalTraining
from bitdance_jax.train.task import TrainingConfig


@dataclass(frozen=True)
class Arguments(Flags):
    """The plan's own flags.

    Attributes:
      topology: a TPU slice: its chip and layout, such as v5e:4x4 or v5p:4x4x8. A v5p-128 has 128 cores, 64 chips: v5p:4x4x4.
      sample: plan the sampler, not the training step: with the config's preview settings (--preview.head-steps, ...).
      per_device: images that each device draws at a time; with --search, the most to try.
      dtype: of weights and activations when sampling.
      search: try meshes and ways to save memory, or with --sample numbers of images, and rank them.
      batch_sizes: batches to try when searching; left out, the config's.
      fsdps, tensors: sizes of those axes of the mesh to try when searching.
      top: lines of each list of findings.
      json: file to write everything to.
    """

    topology: str | None = None
    sample: bool = False
    per_device: BatchSize = 64
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    search: bool = False
    batch_sizes: tuple[BatchSize, ...] = ()
    fsdps: tuple[Size, ...] = (1, 2, 4, 8, 16, 32)
    tensors: tuple[Size, ...] = (1, 2)
    top: Natural = 10
    json: PathName | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.json is not None:
            check_suffix(self.json, ".json", "--json")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        if sys.argv[1:] not in (["-h"], ["--help"]):
            raise UserError(
                "give a config file first: python -m bitdance_jax.plan configs/NAME.py [--topology v5e:4x4 ...]"
            )
        print(__doc__)
        return
    path, *flags = sys.argv[1:]
    path = paths.expand(path)
    if prompted := text_to_image.find_model(path):
        plan_prompts(
            path, prompted, parse(text_to_image.Arguments, flags, prog=f"bitdance_jax.plan {path}")
        )
        return
    own, others = split_flags(flags)
    arguments = parse(Arguments, own, prog="bitdance_jax.plan CONFIG")
    default = load_config(path)
    config = parse(type(default), others, default, prog=f"bitdance_jax.plan {path}")
    devices = find_devices(arguments.topology)
    result = (
        compare(arguments, config, devices)
        if arguments.search
        else describe(arguments, config, devices)
    )
    write_json(arguments.json, {"config": path, "topology": arguments.topology, **result})


def plan_prompts(name: str, config: TextToImageConfig, arguments: text_to_image.Arguments) -> None:
    devices = find_devices(arguments.topology)
    make = text_to_image.compare if arguments.search else text_to_image.describe
    write_json(
        arguments.json,
        {"model": name, "topology": arguments.topology, **make(arguments, config, devices)},
    )


def write_json(path: str | None, result: dict[str, Any]) -> None:
    if path is not None:
        with replace_file(path) as temporary:
            Path(temporary).write_text(json.dumps(result, indent=1) + "\n")


def split_flags(flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of `Arguments`, with their values, and all others, which are the config's."""
    names = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(Arguments)} | {
        "--help",
        "-h",
    }
    parts: tuple[list[str], list[str]] = ([], [])
    mine = False
    for flag in flags:
        if flag.startswith("-"):
            mine = flag.partition("=")[0].replace("_", "-") in names
        parts[0 if mine else 1].append(flag)
    return parts


def describe(
    arguments: Arguments, config: TrainingConfig, devices: list[jax.Device]
) -> dict[str, Any]:
    """Prints one plan; returns it for the JSON file."""
    mesh = make_mesh(config.mesh, devices)
    print(
        f"compiling for {mesh.size} x {devices[0].device_kind}; this can take minutes",
        file=sys.stderr,
    )
    program = (
        sampler(arguments, config, arguments.per_device, mesh)
        if arguments.sample
        else training_step(config, mesh)
    )
    plan = make_plan(program)
    print(report.to_text(plan, arguments.top))
    return {"plan": report.to_dict(plan, arguments.top)}


def compare(
    arguments: Arguments, config: TrainingConfig, devices: list[jax.Device]
) -> dict[str, Any]:
    """Prints the plans that fit, best first, and why the others do not; returns both for the JSON file."""
    if arguments.sample:
        mesh = make_mesh(config.mesh, devices)
        families = search.sampling_candidates(
            lambda count: sampler(arguments, config, count, mesh), arguments.per_device
        )
    else:
        batch_sizes = arguments.batch_sizes or (config.data.batch_size,)
        families = search.training_candidates(
            config, devices, batch_sizes, arguments.fsdps, arguments.tensors
        )
    plans, refused = search.search(families)
    print("\n".join(report.ranking(plans)) if plans else "nothing fits")
    for name, reason in refused:
        print(f"{name}: {reason}", file=sys.stderr)
    return {
        "plans": [{"name": name, **plan.to_dict()} for name, plan in plans],
        "refused": dict(refused),
    }


def sampler(
    arguments: Arguments, config: TrainingConfig, per_device: int, mesh: jax.sharding.Mesh
) -> Program:
    if not isinstance(config, ClassConditionalTraining):
        raise UserError(
            "a tokenizer draws nothing by itself; --sample needs the config of a class-conditional model"
        )
    return sampling(config.model, config.preview, arguments.dtype, per_device, mesh)


if __name__ == "__main__":
    sys.exit(run(main))
