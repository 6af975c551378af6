"""Ranks meshes and memory savings of a training step, or batch sizes of a sampler."""

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
"""From the fastest to the one that needs the least memory."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run a program.

    Attributes:
      name: is printed.
      make: returns the program.
      last_resort: it is never faster than the variant before it, but needs less memory.
    """

    name: str
    make: Callable[[], Program]
    last_resort: bool = False


Family = list[list[Variant]]
"""Lists of variants. In a list each variant needs less memory than the one before it; each list
needs at least as much memory as the list before it, compared variant by variant."""


def training_candidates(
    config: TrainingConfig,
    devices: list[jax.Device],
    batch_sizes: Sequence[int],
    fsdps: Sequence[int],
    tensors: Sequence[int],
) -> list[Family]:
    """A family for each batch size and size of the axis "tensor".

    The lists of a family are its meshes, from the most to the fewest shards of the state. The
    variants of a mesh store less and less for the backward pass, then accumulate gradients over 2,
    4 and 8 micro-batches.
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
    """Powers of two of images a device up to `most`, and `most`; `make` returns the program."""
    counts = sorted({*(2**n for n in range(3, most.bit_length())), most})
    return [
        [
            [Variant(f"{count} images a device", functools.partial(make, count))]
            for count in counts
            if count <= most
        ]
    ]


def search(families: Sequence[Family]) -> tuple[list[tuple[str, Plan]], list[tuple[str, str]]]:
    """The plans that fit, fastest first, and (name, reason) of the rest. Ctrl-C ends the search.

    After the first variant of a list that fits, the next are tried while they are faster: to store
    less for the backward pass can be faster. The next list of the family, which needs more memory,
    begins with the variant that was found.
    """
    plans: list[tuple[str, Plan]] = []
    refused: list[tuple[str, str]] = []
    with tqdm(total=sum(map(len, families)), dynamic_ncols=True) as bar:
        try:
            for family in families:
                _try_family(family, plans, refused, bar)
        except KeyboardInterrupt:
            refused.append(("the rest", "interrupted"))
    return sorted(plans, key=lambda pair: -_speed(pair[1])), refused


def _try_family(
    family: Family, plans: list[tuple[str, Plan]], refused: list[tuple[str, str]], bar: Any
) -> None:
    first = 0
    settled = False
    for variants in family:
        fastest = 0.0
        for number, variant in enumerate(variants):
            if number < first:
                continue
            if fastest and (settled or variant.last_resort):
                break
            bar.set_description(variant.name)
            try:
                program = variant.make()
                _check_arguments_fit(program)
                plan = make_plan(program)
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
            first = number
            fastest = _speed(plan)
        settled = settled or fastest > 0
        bar.update()


def _check_arguments_fit(program: Program) -> None:
    """Raises DoesNotFit, without compiling, if the arguments alone exceed a device's memory."""
    chip = chip_of(program.mesh.devices.flat[0])
    size = resident_bytes(program)
    if chip is not None and size > chip.memory:
        raise DoesNotFit(
            f"its arguments alone need {size / 2**30:.1f} GiB, "
            f"and a device has {chip.memory / 2**30:.1f}"
        )


def _speed(plan: Plan) -> float:
    return plan.images_per_second(plan.estimate.expected) if plan.estimate else 0.0
