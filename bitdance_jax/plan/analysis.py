"""Compiles a program and estimates its memory and time: the plan that is reported and ranked."""

import dataclasses
import re
import time
from dataclasses import dataclass
from typing import Any

import jax

from bitdance_jax.errors import ResourceError, UserError
from bitdance_jax.nn.quantize import num_bytes
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
      program: what was compiled.
      compiled: the result.
      chip: of the devices; None if it is not in `perf.hardware.CHIPS`.
      memory: bytes on each device.
      module: the parsed text of the compiled program.
      rows: the cost of every instruction.
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
        """Floating-point operations on each device."""
        return sum(row.trips * row.flops for row in self.rows)

    def images_per_second(self, seconds: float) -> float:
        return self.program.images / seconds

    def utilisation(self, seconds: float) -> float:
        """Model FLOP utilisation (MFU) of a call that takes this long."""
        assert self.chip is not None
        return self.program.model_flops / (seconds * self.chip.flops * self.program.mesh.size)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        program = self.program
        estimate = self.estimate
        return {
            "program": program.name,
            "mesh": dict(program.mesh.shape),
            "devices": program.mesh.size,
            "chip": self.chip and dataclasses.asdict(self.chip),
            "images": program.images,
            "model_flops": program.model_flops,
            "flops_per_device": self.flops,
            "memory": {**dataclasses.asdict(self.memory), "total": self.memory.total},
            "estimate": estimate and estimate.to_dict(),
            "images_per_second": estimate
            and {name: self.images_per_second(s) for name, s in estimate.bounds.items()},
            "model_flop_utilisation": estimate
            and {name: self.utilisation(s) for name, s in estimate.bounds.items()},
            "compile_seconds": self.compile_seconds,
        }


def make_plan(program: Program) -> Plan:
    """Compiles a program and estimates its costs.

    Raises:
      DoesNotFit: it needs more memory than a device has, by the compiler or by `Memory.total`.
      UserError: this JAX cannot read what the compiler made.
    """
    start = time.monotonic()
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(_memory_message(str(error))) from None
    seconds = time.monotonic() - start
    chip = chip_of(program.mesh.devices.flat[0])
    memory = Memory.of(compiled)
    if chip is not None and memory.total > chip.memory:
        raise DoesNotFit(
            f"it needs {memory.total / 2**30:.1f} GiB, and a device has {chip.memory / 2**30:.1f}"
        )
    module = hlo.parse(_text(compiled))
    rows = costs(module, program.mesh.size, program.trips)
    times = None
    if chip is not None:
        scheduled = scheduled_seconds(module, rows, program.mesh, chip, trips=program.trips)
        times = estimate(rows, program.mesh, chip, scheduled)
    return Plan(program, compiled, chip, memory, module, rows, times, seconds)


def _text(compiled: jax.stages.Compiled) -> str:
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"JAX {jax.__version__} cannot read this program, which libtpu compiled in a newer form"
            f" ({str(error).splitlines()[0][:100]}); plan it with a newer JAX"
        ) from None


def resident_bytes(program: Program) -> int:
    """Bytes of a program's arguments on each device, without compiling it."""
    arrays = [
        leaf
        for leaf in jax.tree.leaves(program.arguments)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]
    shards = (
        jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in arrays
    )
    return int(sum(map(num_bytes, shards)))


def _memory_message(message: str) -> str:
    """The sizes in the compiler's message, which is long, or its first line."""
    sizes = re.findall(r"(\d+(?:\.\d+)?)([KMGT])", message)
    if len(sizes) < 2:
        return message.splitlines()[0]
    return "it needs {}{} of {}{} HBM".format(*sizes[0], *sizes[1])
