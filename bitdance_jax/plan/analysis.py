"""Compiles a program and adds up what it needs: the plan that is reported, and compared with others by a search."""

import dataclasses
import math
import re
import time
from dataclasses import dataclass
from typing import Any

import jax

from bitdance_jax.errors import ResourceError
from bitdance_jax.perf.hardware import Chip, chip_of
from bitdance_jax.plan import hlo
from bitdance_jax.plan.cost import Cost, costs
from bitdance_jax.plan.estimate import Estimate, Memory, estimate
from bitdance_jax.plan.hlo import Module
from bitdance_jax.plan.programs import Program
from bitdance_jax.plan.schedule import scheduled_seconds


class DoesNotFit(ResourceError):
    """The program needs more memory than a device has."""


@dataclass(frozen=True)
class Plan:
    """A compiled program and its costs.

    Attributes:
      program, compiled: what was compiled, and what came of it.
      chip: the devices' figures; None where they are not known, and then there is no estimate.
      memory: bytes on each device.
      module, rows: the compiled text, and every instruction's cost.
      estimate: times; None without a chip.
      compile_seconds: how long the compiler took.
    """

    program: Program
    compiled: jax.stages.Compiled
    chip: Chip | None
    memory: Memory
    module: Module
    rows: list[Cost]
    estimate: Estimate | None
    compile_seconds: float

    @property
    def flops(self) -> int:
        """Operations of the products on each device."""
        return sum(row.trips * row.flops for row in self.rows)

    def images_per_second(self, seconds: float) -> float:
        return self.program.images / seconds

    def utilisation(self, seconds: float) -> float:
        """Model FLOP utilisation of a call that takes so long: the model's own operations over what all chips could do."""
        assert self.chip is not None
        return self.program.model_flops / (seconds * self.chip.flops * self.program.mesh.size)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        program, figures = self.program, self.estimate
        return {
            "program": program.name,
            "mesh": dict(program.mesh.shape),
            "devices": program.mesh.size,
            "chip": self.chip and dataclasses.asdict(self.chip),
            "images": program.images,
            "model_flops": program.model_flops,
            "flops_per_device": self.flops,
            "memory": {**dataclasses.asdict(self.memory), "total": self.memory.total},
            "estimate": figures and figures.to_dict(),
            "images_per_second": figures
            and {name: self.images_per_second(s) for name, s in figures.bounds.items()},
            "model_flop_utilisation": figures
            and {name: self.utilisation(s) for name, s in figures.bounds.items()},
            "compile_seconds": self.compile_seconds,
        }


def make_plan(program: Program) -> Plan:
    """Compiles a program and counts.

    Raises:
      DoesNotFit: the compiler, or the sum of what is held at a time, says that it needs more memory than a device has.
    """
    start = time.monotonic()
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(_too_much(str(error))) from None
    seconds = time.monotonic() - start
    chip = chip_of(program.mesh.devices.flat[0])
    memory = Memory.of(compiled)
    if chip is not None and memory.total > chip.memory:
        raise DoesNotFit(
            f"it needs {memory.total / 2**30:.1f} GiB of a device's {chip.memory / 2**30:.1f}"
        )
    module = hlo.parse(compiled.as_text() or "")
    rows = costs(module, program.mesh.size, program.turns)
    figures = None
    if chip is not None:
        figures = estimate(
            rows,
            program.mesh,
            chip,
            scheduled_seconds(module, rows, program.mesh, chip, program.turns),
        )
    return Plan(program, compiled, chip, memory, module, rows, figures, seconds)


def resident_bytes(program: Program) -> int:
    """Bytes of a program's arguments on each device, known without compiling."""
    arrays = [
        leaf
        for leaf in jax.tree.leaves(program.arguments)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in arrays
    )


def _too_much(message: str) -> str:
    sizes = re.findall(r"(\d+(?:\.\d+)?)([KMGT])", message)
    return (
        "it needs {}{} of {}{} HBM".format(*sizes[0], *sizes[1])
        if len(sizes) > 1
        else message.splitlines()[0]
    )
