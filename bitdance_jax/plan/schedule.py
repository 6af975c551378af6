"""The time of a program in which asynchronous copies and collectives overlap with kernels.

A compiled program lists its instructions in the order of execution. A copy or collective in two
halves (copy-start and copy-done) runs at the same time as the instructions between the halves: a
copy while they do not use the memory, a collective all the time. Everything else runs alone.
"""

import jax

from bitdance_jax.perf.hardware import Chip
from bitdance_jax.plan.control_flow import branches, trip_count
from bitdance_jax.plan.cost import Cost
from bitdance_jax.plan.estimate import seconds
from bitdance_jax.plan.hlo import Computation, Module


def scheduled_seconds(
    module: Module,
    rows: list[Cost],
    mesh: jax.sharding.Mesh,
    chip: Chip,
    *,
    trips: int | None = None,
) -> float:
    """Seconds of one call.

    Args:
      module: the compiled program.
      rows: its costs, `cost.costs`.
      mesh: the devices.
      chip: of the devices.
      trips: as for `cost.costs`.
    """
    return _Schedule(module, rows, mesh, chip, trips).call(module[module.entry])


class _Pending:
    """Operations that have started and not finished; they run one after the other."""

    def __init__(self) -> None:
        self._left: dict[str, float] = {}

    def start(self, name: str, seconds: float) -> None:
        self._left[name] = self._left.get(name, 0.0) + seconds

    def work(self, seconds: float) -> None:
        """The operations run for this time."""
        for name in self._left:
            done = min(seconds, self._left[name])
            seconds -= done
            self._left[name] -= done

    def finish(self, name: str | None) -> float:
        """Seconds until an operation and those before it have finished.

        An unknown name is of an earlier iteration of the loop: then all have to finish.
        """
        names = list(self._left)
        count = names.index(name) + 1 if name in self._left else len(names)
        return sum((self._left.pop(each) for each in names[:count]), 0.0)


class _Schedule:
    def __init__(
        self,
        module: Module,
        rows: list[Cost],
        mesh: jax.sharding.Mesh,
        chip: Chip,
        trips: int | None,
    ) -> None:
        self._module = module
        self._mesh = mesh
        self._chip = chip
        self._trips = trips
        self._rows = {row.instruction.name: row for row in rows}

    def call(self, computation: Computation, trips: int = 1) -> float:
        """Seconds of consecutive runs of a computation, with nothing pending before or after."""
        copies = _Pending()
        collectives = _Pending()
        # What one iteration leaves pending, the next has to finish. All but the first are alike.
        total = self._run(computation, copies, collectives)
        if trips > 1:
            total += (trips - 1) * self._run(computation, copies, collectives)
        return total + copies.finish(None) + collectives.finish(None)

    def _run(self, computation: Computation, copies: _Pending, collectives: _Pending) -> float:
        total = 0.0
        for instruction in computation:
            opcode = instruction.opcode
            called = instruction.called("to_apply") or instruction.called("calls") or ""
            if opcode == "while":
                trips = trip_count(self._module, computation, instruction, self._trips)
                total += copies.finish(None) + collectives.finish(None)
                if trips:
                    total += self.call(self._module[instruction.called("body") or ""], trips)
            elif opcode == "conditional":
                total += max(map(self.call, branches(self._module, instruction)))
            elif opcode in ("call", "async-start"):
                total += self._run(self._module[called], copies, collectives)
            elif instruction.name in self._rows:
                total += self._step(self._rows[instruction.name], copies, collectives)
        return total

    def _step(self, row: Cost, copies: _Pending, collectives: _Pending) -> float:
        """Seconds of one instruction, during which the pending operations run."""
        name = row.instruction.name
        opcode = row.instruction.opcode
        chip = self._chip
        communication = sum((part.seconds(self._mesh, chip) for part in row.collectives), 0.0)
        if opcode.endswith("-start"):
            copies.start(name, row.bytes / chip.bandwidth)
            collectives.start(name, communication)
            return 0.0
        if opcode.endswith("-done"):
            waited = copies.finish(row.instruction.operands[0])
            collectives.work(waited)
            return waited + collectives.finish(row.instruction.operands[0])
        alone = seconds(row, chip) + communication
        copies.work(alone - row.bytes / chip.bandwidth)
        collectives.work(alone)
        return alone
