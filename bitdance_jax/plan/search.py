"""Tries the meshes and the ways to save memory that a training step can have, or numbers of images to draw, and ranks what fits."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from tqdm import tqdm

from bitdance_jax.config import MeshConfig
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.errors import UserError
from bitdance_jax.perf.hardware import chip_of
from bitdance_jax.plan.analysis import DoesNotFit, Plan, make_plan, resident_bytes
from bitdance_jax.plan.programs import Program, training_step
from bitdance_jax.train.task import TrainingConfig


REMATS: tuple[Literal["none", "dots", "nothing"], ...] = ("none", "dots", "nothing")
"""From the fastest to the one that needs least memory."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run something.

    Attributes:
      name: what is printed.
      make: gives the program.
      last_resort: never faster than the variant before it, only smaller.
    """

    name: str
    make: Callable[[], Program]
    last_resort: bool = False


Family = list[list[Variant]]
"""Lists of variants, each from the one that needs most memory to the one that needs least. A list needs at least as much as the one before
it, in the variant of the same number."""


def training_candidates(
    config: TrainingConfig,
    devices: list[jax.Device],
    batch_sizes: Sequence[int],
    fsdps: Sequence[int],
    tensors: Sequence[int],
) -> list[Family]:
    """A family for each batch size and `tensor` axis: its meshes, from the most to the fewest parts that the state is cut into.

    The variants of a mesh: what rematerialisation keeps becomes less, then the batch is cut into 2, 4 and 8.
    """
    savings = [(1, remat) for remat in REMATS] + [(parts, REMATS[-1]) for parts in (2, 4, 8)]

    def variant(
        batch_size: int,
        mesh: MeshConfig,
        accumulate: int,
        remat: Literal["none", "dots", "nothing"],
    ) -> Program:
        run = dataclasses.replace(config.run, remat=remat, accumulate=accumulate)
        changed: dict[str, Any] = {
            "run": run,
            "data": dataclasses.replace(config.data, batch_size=batch_size),
            "mesh": mesh,
        }
        return training_step(dataclasses.replace(config, **changed), make_mesh(mesh, devices))

    def variants(batch_size: int, mesh: MeshConfig) -> list[Variant]:
        name = f"data {mesh.data} fsdp {mesh.fsdp} tensor {mesh.tensor}, batch {batch_size}"
        return [
            Variant(
                f"{name}, remat {remat}" + (f", accumulate {parts}" if parts > 1 else ""),
                functools.partial(variant, batch_size, mesh, parts, remat),
                last_resort=parts > 1,
            )
            for parts, remat in savings
            if batch_size % parts == 0
        ]

    def meshes(tensor: int) -> list[MeshConfig]:
        rows = len(devices) // tensor
        return [
            MeshConfig(rows // fsdp, fsdp, tensor)
            for fsdp in sorted(fsdps, reverse=True)
            if rows % fsdp == 0
        ]

    return [
        [variants(batch_size, mesh) for mesh in meshes(tensor)]
        for batch_size in batch_sizes
        for tensor in tensors
        if len(devices) % tensor == 0
    ]


def sampling_candidates(make: Callable[[int], Program], most: int) -> list[Family]:
    """Powers of two of images a device, up to `most`, which is tried too. `make` gives the program of a number."""
    counts = sorted({*(2**n for n in range(3, most.bit_length())), most})
    return [
        [
            [Variant(f"{count} images a device", functools.partial(make, count))]
            for count in counts
            if count <= most
        ]
    ]


def search(families: Sequence[Family]) -> tuple[list[tuple[str, Plan]], list[tuple[str, str]]]:
    """Plans of what fits, those of most images a second first, and (name, why not) of the rest. Ctrl-C ranks what there is.

    After the first variant of a family that fits, the next are tried too for as long as they are faster: to keep less for the backward
    pass can pay. The rest of the family, which needs more memory, begins with the variant found so.
    """
    plans: list[tuple[str, Plan]] = []
    refused: list[tuple[str, str]] = []
    with tqdm(total=sum(map(len, families)), dynamic_ncols=True) as bar:
        try:
            for family in families:
                _try_family(family, plans, refused, bar)
        except KeyboardInterrupt:
            refused.append(("the rest", "stopped"))
    return sorted(plans, key=lambda pair: -_speed(pair[1])), refused


def _try_family(
    family: Family, plans: list[tuple[str, Plan]], refused: list[tuple[str, str]], bar: Any
) -> None:
    first, settled = 0, False
    for variants in family:
        fastest = 0.0
        for number, variant in enumerate(variants):
            if number < first:
                continue
            if fastest and (settled or variant.last_resort):
                break
            bar.set_description(variant.name)
            try:
                plan = make_plan(_small_enough(variant.make()))
            except DoesNotFit as error:
                refused.append((variant.name, str(error)))
                first = number + 1
                continue
            except UserError as error:
                refused.append((variant.name, str(error)))
                break
            plans.append((variant.name, plan))
            if _speed(plan) <= fastest:
                break
            first, fastest = number, _speed(plan)
        settled = settled or fastest > 0
        bar.update()


def _small_enough(program: Program) -> Program:
    """The program, unless its arguments alone are more than a device holds: then nothing needs to be compiled."""
    chip, size = chip_of(program.mesh.devices.flat[0]), resident_bytes(program)
    if chip is not None and size > chip.memory:
        raise DoesNotFit(
            f"its arguments alone need {size / 2**30:.1f} GiB of a device's {chip.memory / 2**30:.1f}"
        )
    return program


def _speed(plan: Plan) -> float:
    return plan.images_per_second(plan.estimate.expected) if plan.estimate else 0.0
