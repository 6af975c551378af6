"""Memory and time of one call of a compiled program on each device: a roofline.

Assumptions. Each kernel takes the longer of its products at the chip's peak and its bytes at the memory's bandwidth; work on vectors, and
whatever stays in a TPU's vector memory, takes no time. Exchanges run at the links' full rate round rings, each as if alone, and one
microsecond a hop (`collectives.Collective.seconds`). Three figures come of it: `overlapped`, where arithmetic, memory and exchanges all
hide behind the longest of the three, `scheduled`, where what the compiler starts ahead hides behind what runs meanwhile
(`plan.schedule`), and `serial`, where everything follows one another. None knows of the input, the host, or how well the matrix units are
filled; `compiler_seconds`, where a TPU's compiler tells its own estimate of each kernel, knows the last.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax

from bitdance_jax.perf.hardware import Chip
from bitdance_jax.plan.cost import Cost


@dataclass(frozen=True)
class Memory:
    """Bytes on each device. Outputs that take the place of arguments (donated ones) are `aliased` and count once."""

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
      kernels: instructions executed, loops in full.
      flops: operations of products, loops in full.
      bytes: between main memory and the chip.
      sent: bytes sent to other devices.
      arithmetic, memory, communication: seconds of each by itself.
      kernel_seconds: each kernel's longer side, added up.
      scheduled: see above.
      compiler_seconds: the TPU compiler's estimate of the kernels; None elsewhere.
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
        """Seconds of a call: overlapped at best, scheduled, serial without any overlap, and the compiler's kernels, then the exchanges."""
        bounds = {
            "overlapped": max(self.arithmetic, self.memory, self.communication),
            "scheduled": self.scheduled,
            "serial": self.kernel_seconds + self.communication,
        }
        return (
            bounds
            if self.compiler_seconds is None
            else {**bounds, "compiler": self.compiler_seconds + self.communication}
        )

    @property
    def expected(self) -> float:
        """The least hopeful of the bounds, by which plans are compared."""
        return max(self.bounds.values())

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "bounds": self.bounds}


def seconds(cost: Cost, chip: Chip) -> float:
    """Of one execution of one kernel, without what it sends."""
    return max(cost.flops * cost.passes / chip.flops, cost.bytes / chip.bandwidth)


def compiler_seconds(cost: Cost, chip: Chip) -> float:
    """The same, as the TPU's compiler estimates it; by the roofline where it does not say."""
    return cost.cycles / chip.clock if cost.cycles and chip.clock else seconds(cost, chip)


def estimate(rows: list[Cost], mesh: jax.sharding.Mesh, chip: Chip, scheduled: float) -> Estimate:
    """Adds up what `cost.costs` gave; `scheduled` is `schedule.scheduled_seconds`."""
    exchanges = [(row.trips, exchange) for row in rows for exchange in row.collectives]
    flops, moved = (
        sum(row.trips * row.flops for row in rows),
        sum(row.trips * row.bytes for row in rows),
    )
    return Estimate(
        kernels=sum(row.trips for row in rows),
        flops=flops,
        bytes=moved,
        sent=sum(trips * exchange.sent for trips, exchange in exchanges),
        arithmetic=sum(row.trips * row.flops * row.passes for row in rows) / chip.flops,
        memory=moved / chip.bandwidth,
        communication=sum(
            (trips * exchange.seconds(mesh, chip) for trips, exchange in exchanges), 0.0
        ),
        kernel_seconds=sum(row.trips * seconds(row, chip) for row in rows),
        scheduled=scheduled,
        compiler_seconds=sum(row.trips * compiler_seconds(row, chip) for row in rows)
        if chip.clock
        else None,
    )
