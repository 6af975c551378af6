"""`bitdance plan`: memory and speed of training or sampling, on devices that need not be present.

    bitdance plan imagenet_h_1x --topology v5p:4x4x4 --mesh.fsdp 16
    bitdance plan imagenet_b_1x --topology v5e:2x4 --sample --per-device 64
    bitdance plan imagenet_l_1x --topology v5e:4x4 --search --json plans.json
    bitdance plan 14b_64x --topology v5e:2x4 --size 1024x1024 --batch-size 4 --search

A config, as for `bitdance train`, is compiled for the devices, and its values are flags too. In the
last example a released text-to-image model takes the place of the config; a folder or Hugging Face
id of one may, too. `--help` after it lists its flags. A topology needs the TPU compiler
(`pip install libtpu`) but no TPU; without one the plan is for the devices of this machine.
`bitdance_jax/plan/estimate.py` says what the times assume.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax

from bitdance_jax.cli.config_file import load_config
from bitdance_jax.cli.flags import parse, split
from bitdance_jax.config import MeshConfig, TextToImageConfig
from bitdance_jax.config.plain import BatchSize, Config, HeadSteps, Natural, PathName, Size
from bitdance_jax.configs import SHIPPED
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.errors import ConfigError
from bitdance_jax.io import paths
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.io.paths import check_suffix
from bitdance_jax.pipelines.text_to_image import ALL_DEVICES, RELEASED_SAMPLER
from bitdance_jax.pipelines.weights import WeightType
from bitdance_jax.plan import report, search, text_to_image
from bitdance_jax.plan.analysis import make_plan
from bitdance_jax.plan.devices import find_devices
from bitdance_jax.plan.programs import Program, sampling, training_step
from bitdance_jax.plan.text_to_image_programs import Setting
from bitdance_jax.train.class_conditional_training import ClassConditionalTraining
from bitdance_jax.train.task import TrainingConfig


CONFIGS = f"the package has {', '.join(SHIPPED)}, 14b_16x, 14b_64x"


@dataclass(frozen=True)
class Arguments(Config):
    """The plan's own flags.

    Attributes:
      topology: a TPU slice: its chip and layout, such as v5e:4x4 or v5p:4x4x8. A v5p-128 has 128
        cores, which are 64 chips: v5p:4x4x4.
      sample: plan the sampler, not the training step, with the config's preview settings
        (--preview.head-steps, ...).
      per_device: images that each device generates at a time; with --search, the most to try.
      dtype: of weights and activations when sampling.
      search: try meshes and ways to save memory, or with --sample numbers of images, and rank them.
      batch_sizes: batch sizes that the search tries; default: the config's.
      fsdps, tensors: sizes of these mesh axes that the search tries.
      top: lines of each list of findings.
      json: file for all results.
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
        check_suffix(self.json, ".json", "json")


@dataclass(frozen=True)
class PromptArguments(Config):
    """Plans how a text-to-image model generates a batch of prompts.

    Attributes:
      topology: a TPU slice, as for other plans.
      size: WIDTHxHEIGHT in pixels.
      batch_size: images generated at a time, on all devices together.
      weights: the type of the weights in memory.
      dtype: compute type.
      prompt_tokens: length of the longest prompt, with its template.
      head_steps, guidance_scale: as for `bitdance sample`.
      mesh: how the devices share the work.
      search: try all sizes of --mesh.data and --mesh.tensor, and rank them.
      top: lines of each list of findings.
      json: file for all results.
    """

    topology: str | None = None
    size: str = "1024x1024"
    batch_size: BatchSize = 1
    weights: WeightType = "bfloat16"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    prompt_tokens: Size = 60
    head_steps: HeadSteps = RELEASED_SAMPLER.head_steps
    guidance_scale: float = RELEASED_SAMPLER.guidance_scale
    mesh: MeshConfig = ALL_DEVICES
    search: bool = False
    top: Natural = 10
    json: PathName | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_suffix(self.json, ".json", "json")

    def setting(self) -> Setting:
        return Setting(
            size=self.size,
            batch_size=self.batch_size,
            weights=self.weights,
            dtype=self.dtype,
            prompt_tokens=self.prompt_tokens,
            sampler=replace(
                RELEASED_SAMPLER, head_steps=self.head_steps, guidance_scale=self.guidance_scale
            ),
            mesh=self.mesh,
        )


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        if sys.argv[1:] not in (["-h"], ["--help"]):
            raise ConfigError(f"give a config first: {sys.argv[0]} NAME; {CONFIGS}")
        print(f"{__doc__}\n{CONFIGS}")
        return
    name, *flags = sys.argv[1:]
    name = paths.expand(name)
    program = f"{sys.argv[0]} {name}"
    if model := text_to_image.find_model(name):
        plan_prompts(name, model, parse(PromptArguments, flags, prog=program))
        return
    fields = [field.name for field in dataclasses.fields(Arguments)]
    own, others = split(flags, [*fields, "help"])
    arguments = parse(Arguments, own, prog=f"{sys.argv[0]} CONFIG")
    default, others = load_config(name, others)
    config = parse(type(default), others, default, prog=program)
    devices = find_devices(arguments.topology)
    make = compare if arguments.search else describe
    result = make(arguments, config, devices)
    write_json(arguments.json, {"config": name, "topology": arguments.topology, **result})


def plan_prompts(name: str, config: TextToImageConfig, arguments: PromptArguments) -> None:
    devices = find_devices(arguments.topology)
    setting = arguments.setting()
    if arguments.search:
        result = text_to_image.compare(setting, config, devices)
    else:
        result = text_to_image.describe(setting, config, devices, arguments.top)
    write_json(arguments.json, {"model": name, "topology": arguments.topology, **result})


def write_json(path: str | None, result: dict[str, Any]) -> None:
    if path is not None:
        with replace_file(path) as temporary:
            Path(temporary).write_text(json.dumps(result, indent=1) + "\n")


def describe(
    arguments: Arguments, config: TrainingConfig, devices: list[jax.Device]
) -> dict[str, Any]:
    """Prints one plan; returns it for the JSON file."""
    mesh = make_mesh(config.mesh, devices)
    print(
        f"compiling for {mesh.size} x {devices[0].device_kind}; this can take minutes",
        file=sys.stderr,
    )
    if arguments.sample:
        program = sampler(arguments, config, arguments.per_device, mesh)
    else:
        program = training_step(config, mesh)
    plan = make_plan(program)
    print(report.to_text(plan, arguments.top))
    return {"plan": report.to_dict(plan, arguments.top)}


def compare(
    arguments: Arguments, config: TrainingConfig, devices: list[jax.Device]
) -> dict[str, Any]:
    """Prints the plans that fit, the best first, and why others do not; returns both."""
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
        raise ConfigError(
            "sample needs the config of a class-conditional model; "
            "a tokenizer generates no images by itself",
            "sample",
        )
    return sampling(config.model, config.preview, arguments.dtype, per_device, mesh)
