"""Memory and time of one call of a compiled program on each device: a roofline.

Assumptions: A kernel takes either the time of its matrix products at the chip's peak or the time
of its bytes at the memory's bandwidth, whichever is longer. Elementwise work, and accesses to a
TPU's vector memory, take no time. A collective runs alone, at the full rate of the links of its
rings, and takes a microsecond a hop (`collectives.Collective.seconds`).

Three times follow: `overlapped`, in which arithmetic, memory and collectives overlap completely;
`scheduled`, in which what the compiler starts early overlaps with what runs meanwhile (`schedule`);
and `serial`, in which nothing overlaps. None of them includes the input, the host, or partly filled
matrix units. The last are in `compiler_seconds`, the TPU compiler's own estimate of the kernels.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax

from bitdance_jax.perf.hardware import Chip
from bitdance_jax.plan.cost import Cost


@dataclass(frozen=True)
class Memory:
    """Bytes on each device. `aliased`: of the outputs in the memory of donated arguments."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> "Memory":
        stats: Any = compiled.memory_analysis()
        return cls(
            stats.argument_size_in_bytes,
            stats.output_size_in_bytes,
            stats.alias_size_in_bytes,
            stats.temp_size_in_bytes,
            stats.generated_code_size_in_bytes,
        )


@dataclass(frozen=True)
class Estimate:
    """One call on one device.

    Attributes:
      kernels: instructions executed, counting every iteration of loops.
      flops: their floating-point operations.
      bytes: read from and written to main memory.
      sent: bytes sent to other devices.
      arithmetic: seconds of the operations alone.
      memory: seconds of the memory accesses alone.
      communication: seconds of the collectives alone.
      kernel_seconds: sum over the kernels of the longer of arithmetic and memory.
      scheduled: seconds of the call, see above.
      compiler_seconds: the TPU compiler's estimate of the kernels; None on other devices.
    """

    kernels: int
    flops: int
    bytes: int
    sent: int
    arithmetic: float
    memory: float
    communication: float
    kernel_seconds: float
    scheduled: float
    compiler_seconds: float | None

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds of a call by name; "compiler" is the compiler's kernels, then the collectives."""
        bounds = {
            "overlapped": max(self.arithmetic, self.memory, self.communication),
            "scheduled": self.scheduled,
            "serial": self.kernel_seconds + self.communication,
        }
        if self.compiler_seconds is not None:
            bounds["compiler"] = self.compiler_seconds + self.communication
        return bounds

    @property
    def expected(self) -> float:
        """The longest of the bounds, by which plans are ranked."""
        return max(self.bounds.values())

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "bounds": self.bounds}


def seconds(cost: Cost, chip: Chip) -> float:
    """Seconds of one execution of one kernel, without its collectives."""
    return max(cost.flops * cost.passes / chip.flops, cost.bytes / chip.bandwidth)


def compiler_seconds(cost: Cost, chip: Chip) -> float:
    """The TPU compiler's estimate of the same; `seconds` if it gives none."""
    return cost.cycles / chip.clock if cost.cycles and chip.clock else seconds(cost, chip)


def estimate(rows: list[Cost], mesh: jax.sharding.Mesh, chip: Chip, scheduled: float) -> Estimate:
    """Sums the costs of a program, `cost.costs`.

    Args:
      rows: the costs.
      mesh: the devices.
      chip: of the devices.
      scheduled: `schedule.scheduled_seconds`.
    """
    collectives = [(row.trips, collective) for row in rows for collective in row.collectives]
    size = sum(row.trips * row.bytes for row in rows)
    compiler = None
    if chip.clock:
        compiler = sum(row.trips * compiler_seconds(row, chip) for row in rows)
    return Estimate(
        kernels=sum(row.trips for row in rows),
        flops=sum(row.trips * row.flops for row in rows),
        bytes=size,
        sent=sum(trips * collective.sent for trips, collective in collectives),
        arithmetic=sum(row.trips * row.flops * row.passes for row in rows) / chip.flops,
        memory=size / chip.bandwidth,
        communication=sum(
            (trips * collective.seconds(mesh, chip) for trips, collective in collectives), 0.0
        ),
        kernel_seconds=sum(row.trips * seconds(row, chip) for row in rows),
        scheduled=scheduled,
        compiler_seconds=compiler,
    )
