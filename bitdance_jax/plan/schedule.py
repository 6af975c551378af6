"""How long a program takes when what its compiler starts ahead of time hides behind what runs meanwhile.

A compiled program lists its instructions in the order in which they run. Copies and exchanges in two halves (copy-start ... copy-done) run
beside what stands between the halves: copies as far as the kernels there leave the memory alone, exchanges at their own pace. Everything
else runs by itself.
"""

import jax

from bitdance_jax.perf.hardware import Chip
from bitdance_jax.plan.cost import Cost, branches, trip_count
from bitdance_jax.plan.estimate import seconds
from bitdance_jax.plan.hlo import Computation, Module


def scheduled_seconds(
    module: Module, rows: list[Cost], mesh: jax.sharding.Mesh, chip: Chip, turns: int | None = None
) -> float:
    """Of one call.

    Args:
      rows: `cost.costs` of the module.
      turns: as for `cost.costs`.
    """
    return _Schedule(module, rows, mesh, chip, turns).call(module[module.entry])


class _Pending:
    """What has been started and not finished; first come, first served."""

    def __init__(self) -> None:
        self._left: dict[str, float] = {}

    def start(self, name: str, seconds: float) -> None:
        self._left[name] = self._left.get(name, 0.0) + seconds

    def work(self, seconds: float) -> None:
        """Goes on for so long, beside something else."""
        for name in self._left:
            done = min(seconds, self._left[name])
            seconds -= done
            self._left[name] -= done

    def finish(self, name: str | None) -> float:
        """Seconds until it is done, and what was started before it. One that is not here is of an earlier turn of the loop: then of all."""
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
        turns: int | None,
    ) -> None:
        self._module, self._mesh, self._chip, self._turns = module, mesh, chip, turns
        self._rows = {row.instruction.name: row for row in rows}

    def call(self, computation: Computation, turns: int = 1) -> float:
        """Seconds of a computation that runs so often in a row, with nothing started before and nothing left over."""
        pending = (_Pending(), _Pending())
        # The first turn finds nothing started; all others find what the one before has left them.
        total = self._run(computation, *pending)
        if turns > 1:
            total += (turns - 1) * self._run(computation, *pending)
        return total + sum(each.finish(None) for each in pending)

    def _run(self, computation: Computation, copies: _Pending, exchanges: _Pending) -> float:
        total = 0.0
        for instruction in computation:
            opcode, called = (
                instruction.opcode,
                instruction.called("to_apply") or instruction.called("calls") or "",
            )
            if opcode == "while":
                count = trip_count(self._module, computation, instruction, self._turns)
                total += copies.finish(None) + exchanges.finish(None)
                total += (
                    self.call(self._module[instruction.called("body") or ""], count)
                    if count
                    else 0.0
                )
            elif opcode == "conditional":
                total += max(map(self.call, branches(self._module, instruction)))
            elif opcode in ("call", "async-start"):
                total += self._run(self._module[called], copies, exchanges)
            elif instruction.name in self._rows:
                total += self._step(self._rows[instruction.name], copies, exchanges)
        return total

    def _step(self, row: Cost, copies: _Pending, exchanges: _Pending) -> float:
        """Seconds that pass in one instruction; what runs beside it goes on."""
        name, opcode, chip = row.instruction.name, row.instruction.opcode, self._chip
        sent = sum((part.seconds(self._mesh, chip) for part in row.collectives), 0.0)
        if opcode.endswith("-start"):
            copies.start(name, row.bytes / chip.bandwidth)
            exchanges.start(name, sent)
            return 0.0
        if opcode.endswith("-done"):
            waited = copies.finish(row.instruction.operands[0])
            exchanges.work(waited)
            return waited + exchanges.finish(row.instruction.operands[0])
        alone = seconds(row, chip) + sent
        copies.work(alone - row.bytes / chip.bandwidth)
        exchanges.work(alone)
        return alone
