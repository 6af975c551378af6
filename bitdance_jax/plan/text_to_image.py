"""Plans of text-to-image sampling: the three programs that generate a batch of prompts."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from bitdance_jax.config import MeshConfig, TextToImageConfig, from_dict
from bitdance_jax.convert import hub_config
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.errors import UserError
from bitdance_jax.io import model_folder
from bitdance_jax.models import text_to_image as model
from bitdance_jax.pipelines.checks import parse_size
from bitdance_jax.pipelines.hub_models import cached, is_hub_id
from bitdance_jax.plan import report
from bitdance_jax.plan.analysis import Plan, make_plan
from bitdance_jax.plan.text_to_image_programs import BatchPrograms, Setting
from bitdance_jax.sampling.guidance import rows_of_image


BOUNDS = {
    "overlapped": "all overlaps, s an image",
    "scheduled": "roofline",
    "serial": "nothing overlaps",
    "compiler": "compiler",
}
"""Titles of `Estimate.bounds` in a table."""


class BatchPlan(NamedTuple):
    """Plans of the programs that generate one batch on a mesh.

    Attributes:
      plans: of the prompts, the patches, and the decoder.
      calls: how often each runs.
      images: of the batch.
      weight_seconds: to read the weights from memory: the head's for every evaluation, the others
        for every patch; None if the chip is unknown.
    """

    plans: tuple[Plan, Plan, Plan]
    calls: tuple[int, int, int]
    images: int
    weight_seconds: float | None

    def seconds(self, bound: str) -> float | None:
        """Seconds of one image, by one of `Estimate.bounds`; None if unknown."""
        bounds = [plan.estimate.bounds for plan in self.plans if plan.estimate]
        if len(bounds) < len(self.plans) or bound not in bounds[0]:
            return None
        calls = zip(self.calls, bounds, strict=True)
        return sum(count * each[bound] for count, each in calls) / self.images


def find_model(name: str) -> TextToImageConfig | None:
    """The config of "14b_16x", "14b_64x", a model folder or a Hugging Face id; None for other
    names, which are those of training configs. No weights are downloaded."""
    released = name.lower().replace("-", "_").removeprefix("bitdance_")
    if released in ("14b_16x", "14b_64x"):
        return TextToImageConfig.released(released)
    if not (Path(name).is_dir() or is_hub_id(name)) or name.endswith(".py"):
        return None
    folder = name
    if is_hub_id(name):
        folder = str(cached(name))
        if not model_folder.is_model_folder(folder):
            return hub_config.read(name)
    return from_dict(
        TextToImageConfig,
        model_folder.read_config(folder, expect="text_to_image").config,
        f"{folder}/config.json: config",
    )


def check(setting: Setting, config: TextToImageConfig) -> None:
    """Raises a UserError for a size that the model cannot generate."""
    model.check_size(config, *parse_size(setting.size))


def describe(
    setting: Setting, config: TextToImageConfig, devices: list[jax.Device], top: int = 10
) -> dict[str, Any]:
    """Prints the plan of a batch; returns it for a JSON file."""
    check(setting, config)
    mesh = make_mesh(setting.mesh, devices)
    print(
        f"compiling three programs for {mesh.size} x {devices[0].device_kind}; this takes minutes",
        file=sys.stderr,
    )
    batch = plan_batch(setting, config, mesh)
    for plan in batch.plans:
        print(report.to_text(plan, top) + "\n")
    print("\n".join(summary(batch)))
    return {
        "programs": [report.to_dict(plan, top) for plan in batch.plans],
        **_to_dict(batch),
    }


def compare(
    setting: Setting, config: TextToImageConfig, devices: list[jax.Device]
) -> dict[str, Any]:
    """Prints how fast each mesh generates a batch, fastest first; returns it for a JSON file."""
    check(setting, config)
    batches: list[tuple[str, BatchPlan]] = []
    decoder: Plan | None = None
    refused: dict[str, str] = {}
    rows = setting.batch_size * rows_of_image(setting.sampler)
    meshes = [
        MeshConfig(data=data, tensor=len(devices) // data)
        for data in range(1, len(devices) + 1)
        if len(devices) % data == 0
    ]
    for mesh in tqdm([mesh for mesh in meshes if rows % mesh.data == 0], dynamic_ncols=True):
        name = f"mesh.data={mesh.data} mesh.tensor={mesh.tensor}"
        try:
            batches.append((name, plan_batch(setting, config, make_mesh(mesh, devices), decoder)))
            decoder = batches[-1][1].plans[2]  # It is sharded over all devices on every mesh.
        except UserError as error:
            refused[name] = str(error)
    batches.sort(key=lambda pair: max(pair[1].seconds(bound) or 0.0 for bound in BOUNDS))
    print("\n".join(_times_table(batches)) if batches else "nothing fits")
    for name, reason in refused.items():
        print(f"{name}: {reason}", file=sys.stderr)
    return {
        "batches": [{"name": name, **_to_dict(batch)} for name, batch in batches],
        "refused": refused,
    }


def summary(batch: BatchPlan) -> list[str]:
    """Lines of a table: memory, and seconds an image as multiples of reading the weights."""
    mesh = batch.plans[0].program.mesh
    layout = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return [
        f"a batch of {batch.images} on {mesh.size} x {mesh.devices.flat[0].device_kind}, "
        f"mesh {layout}:",
        "",
        *_times_table([("", batch)]),
    ]


def _times_table(batches: list[tuple[str, BatchPlan]]) -> list[str]:
    rows = []
    for name, batch in batches:
        limit = batch.weight_seconds and batch.weight_seconds / batch.images
        row = [
            name,
            f"{max(plan.memory.total for plan in batch.plans) / 2**30:.1f}",
            f"{limit:.2f}" if limit else "-",
        ]
        for bound in BOUNDS:
            seconds = batch.seconds(bound)
            if seconds is None or limit is None:
                row.append("-")
            else:
                row.append(f"{seconds:.2f} ({seconds / limit:.1f} x)")
        rows.append(row)
    return report.table(["", "GiB a device", "reading weights, s an image", *BOUNDS.values()], rows)


def _to_dict(batch: BatchPlan) -> dict[str, Any]:
    return {
        "images": batch.images,
        "calls": batch.calls,
        "memory": [plan.memory.total for plan in batch.plans],
        "weight_seconds_an_image": batch.weight_seconds and batch.weight_seconds / batch.images,
        "seconds_an_image": {bound: batch.seconds(bound) for bound in BOUNDS},
    }


def plan_batch(
    setting: Setting, config: TextToImageConfig, mesh: Mesh, decoder: Plan | None = None
) -> BatchPlan:
    """Compiles the programs of `TextToImage.generate`; the decoder only if its plan is not given.

    Raises:
      UserError: a mesh that does not divide the model, or the batch.
      DoesNotFit: it needs more memory than a device has.
    """
    batch = BatchPrograms(setting, config, mesh)
    begin = make_plan(batch.begin())
    plans = (begin, make_plan(batch.advance(begin)), decoder or make_plan(batch.decode()))
    calls = (1, 1, -(-setting.batch_size // plans[2].program.images))
    seconds = batch.bytes_read() / begin.chip.bandwidth if begin.chip else None
    return BatchPlan(plans, calls, setting.batch_size, seconds)
