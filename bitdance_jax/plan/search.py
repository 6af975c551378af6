"""Tries the meshes and the ways to save memory that a training step can have, and ranks those that fit."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
from tqdm import tqdm

from bitdance_jax import sharding
from bitdance_jax.config import MeshConfig, Training
from bitdance_jax.errors import UserError
from bitdance_jax.hardware import chip_of
from bitdance_jax.plan.analysis import DoesNotFit, Plan, make_plan, resident_bytes
from bitdance_jax.plan.programs import Program, training_step


MAX_TENSOR = 8
"""More parts of one layer's width than this are not tried."""

REMATS: tuple[Literal["none", "dots", "nothing"], ...] = ("none", "dots", "nothing")
"""From the fastest to the one that needs least memory."""

Maker = Callable[[], Program]


def training_candidates(config: Training, devices: list[jax.Device], batch_sizes: Sequence[int]) -> Iterator[list[tuple[str, Maker]]]:
    """Groups of named programs, in each from the fastest to the one that needs least memory: the first that fits is the group's best.

    A group is a mesh and a batch size; in it, rematerialisation and then accumulation grow.
    """
    micro_batches = [1, 2, 4, 8]
    for (data, fsdp, tensor), batch_size in itertools.product(_factors(len(devices)), batch_sizes):
        mesh = sharding.make_mesh(MeshConfig(data, fsdp, tensor), devices)
        group: list[tuple[str, Maker]] = []
        for accumulate, remat in [(1, remat) for remat in REMATS] + [(parts, REMATS[-1]) for parts in micro_batches[1:]]:
            run = dataclasses.replace(config.run, remat=remat, accumulate=accumulate)
            changed: dict[str, Any] = {
                "run": run,
                "data": dataclasses.replace(config.data, batch_size=batch_size),
                "mesh": MeshConfig(data, fsdp, tensor),
            }
            if batch_size % accumulate == 0:
                name = f"data {data} fsdp {fsdp} tensor {tensor}, batch {batch_size}, remat {remat}, accumulate {accumulate}"
                group.append((name, functools.partial(training_step, dataclasses.replace(config, **changed), mesh)))
        yield group


def sampling_candidates(make: Callable[[int], Program], most: int) -> list[list[tuple[str, Maker]]]:
    """A group for each power of two of pictures a device, up to `most`, which is tried too. `make` gives the program of a number."""
    counts = sorted({*(2**n for n in range(3, most.bit_length())), most})
    return [[(f"{count} images a device", functools.partial(make, count))] for count in counts if count <= most]


def search(groups: Sequence[list[tuple[str, Maker]]]) -> tuple[list[tuple[str, Plan]], list[tuple[str, str]]]:
    """Plans of what fits, those of most images a second first, and (name, why not) of the rest."""
    plans: list[tuple[str, Plan]] = []
    refused: list[tuple[str, str]] = []
    with tqdm(total=len(groups), unit="mesh", dynamic_ncols=True) as bar:
        for group in groups:
            for name, make in group:
                bar.set_description(name)
                try:
                    plans.append((name, make_plan(_small_enough(make()))))
                    break
                except DoesNotFit as error:
                    refused.append((name, str(error)))
                except UserError as error:
                    refused.append((name, str(error)))
                    break
            bar.update()
    return sorted(plans, key=lambda pair: -_speed(pair[1])), refused


def _small_enough(program: Program) -> Program:
    """The program, unless its arguments alone are more than a device holds: then nothing needs to be compiled."""
    chip, size = chip_of(program.mesh.devices.flat[0]), resident_bytes(program)
    if chip is not None and size > chip.memory:
        raise DoesNotFit(f"its arguments alone need {size / 2**30:.1f} GiB of a device's {chip.memory / 2**30:.1f}")
    return program


def _speed(plan: Plan) -> float:
    return plan.images_per_second(plan.estimate.expected) if plan.estimate else 0.0


def _factors(devices: int) -> list[tuple[int, int, int]]:
    """(data, fsdp, tensor) of every mesh of so many devices."""
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    return [
        (devices // fsdp // tensor, fsdp, tensor)
        for tensor in sizes
        for fsdp in sizes
        if tensor <= MAX_TENSOR and devices % (fsdp * tensor) == 0
    ]
