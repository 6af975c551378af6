"""The cost of every instruction of a compiled program: executions, operations, bytes, collectives.

An instruction is what the device runs as one kernel: a fusion is one instruction. Bytes are those
read from and written to main memory: the operands and results of an instruction, or the slices of
them that it reads or writes. A TPU's vector memory does not count, nor do the bytes of collectives,
whose time is communication.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from bitdance_jax.plan import collectives
from bitdance_jax.plan.collectives import Collective
from bitdance_jax.plan.control_flow import branches, trip_count
from bitdance_jax.plan.hlo import Computation, Instruction, Module, Shape, leaves
from bitdance_jax.plan.hlo_flops import flops, passes


_FREE = {
    "add-dependency",
    "after-all",
    "async-start",
    "async-update",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
}
"""Opcodes that cost nothing themselves."""

_FREE_CALLS = (
    "AllocateBuffer",
    "AsyncCollectiveDone",
    "AsyncCollectiveStart",
    "ConcatBitcast",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
    "Sharding",
)
"""Targets of custom calls that cost nothing."""

_READS_SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Cost:
    """The cost of one execution of an instruction.

    Attributes:
      instruction: of the program.
      computation: that contains the instruction.
      trips: executions in one call of the program.
      looped: whether it is in a loop.
      flops: operations of matrix products and convolutions.
      passes: see `hlo_flops.passes`.
      bytes: read from and written to main memory.
      cycles: the TPU compiler's estimate; 0 if it gives none.
      collectives: that it starts.
      op_name: its JAX operation; if the compiler names none, that of an instruction in the fusion
        or of an operand.
    """

    instruction: Instruction
    computation: Computation
    trips: int
    looped: bool
    flops: int
    passes: int
    bytes: int
    cycles: int
    collectives: tuple[Collective, ...]
    op_name: str


def costs(module: Module, devices: int, trips: int | None = None) -> list[Cost]:
    """The cost of every instruction that a call of the program runs.

    Args:
      module: the program.
      devices: how many run it.
      trips: iterations of the loop, if there is one, whose number is an argument of the program.
    """
    walk = _Walk(module, devices, trips)
    return list(walk.costs(module[module.entry], trips=1, looped=False))


@dataclass(frozen=True)
class _Walk:
    """Visits every instruction that a call of a program runs."""

    module: Module
    devices: int
    default_trips: int | None

    def costs(self, computation: Computation, *, trips: int, looped: bool) -> Iterator[Cost]:
        """The costs of a computation that runs `trips` times in a call."""
        module = self.module
        channels: set[str] = set()
        for instruction in computation:
            opcode = instruction.opcode
            if opcode == "while":
                body = module[instruction.called("body") or ""]
                count = trip_count(module, computation, instruction, self.default_trips)
                yield from self.costs(body, trips=trips * count, looped=True)
            elif opcode == "conditional":
                yield from self._most_expensive_branch(instruction, trips, looped)
            elif opcode in ("call", "async-start"):
                name = instruction.called("to_apply") or instruction.called("calls") or ""
                yield from self.costs(module[name], trips=trips, looped=looped)
            elif opcode not in _FREE:
                found = collectives.find(module, computation, instruction, self.devices)
                # On TPUs several fusions contain the same collective, with the same channel.
                new = tuple(part for part in found if part.channel not in channels)
                channels.update(part.channel for part in new if part.channel)
                yield Cost(
                    instruction,
                    computation,
                    trips=trips,
                    looped=looped,
                    flops=flops(module, computation, instruction),
                    passes=passes(module, computation, instruction),
                    bytes=memory_bytes(module, computation, instruction),
                    cycles=int(instruction.attribute(r'"estimated_cycles":"(\d+)"') or 0),
                    collectives=new,
                    op_name=_op_name(module, computation, instruction),
                )

    def _most_expensive_branch(
        self, instruction: Instruction, trips: int, looped: bool
    ) -> list[Cost]:
        taken = [
            list(self.costs(branch, trips=trips, looped=looped))
            for branch in branches(self.module, instruction)
        ]
        return max(taken, key=lambda rows: sum(row.flops * row.trips for row in rows))


def _op_name(module: Module, computation: Computation, instruction: Instruction) -> str:
    inside = module[instruction.called("calls") or ""] if instruction.opcode == "fusion" else ()
    operands = (computation[name] for name in instruction.operands)
    return next((part.op_name for part in (instruction, *inside, *operands) if part.op_name), "")


def memory_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes of main memory that one execution reads and writes."""
    opcode = instruction.opcode
    results = list(leaves(instruction.shape))
    operands = [list(leaves(computation[name].shape)) for name in instruction.operands]
    base = opcode.removesuffix("-start")
    if (
        opcode in _FREE
        or opcode.endswith(("-done", "-update"))
        or base in collectives.KINDS
        or _is_free_call(instruction)
    ):
        return 0
    if opcode == "copy-start":
        return _main_memory_bytes(results[:2])
    if base == "dynamic-update-slice":
        return 2 * _main_memory_bytes(operands[1])
    if base in _READS_SLICES:
        slice_ = results[1] if opcode.endswith("-start") else results[0]
        return _main_memory_bytes([slice_]) + (
            slice_.bytes if _main_memory_bytes(operands[0]) else 0
        )
    if opcode == "fusion":
        return _fusion_bytes(module, instruction, results, operands)
    return _main_memory_bytes(results) + sum(map(_main_memory_bytes, operands))


def _fusion_bytes(
    module: Module, instruction: Instruction, results: list[Shape], operands: list[list[Shape]]
) -> int:
    inner = module[instruction.called("calls") or ""]
    read = sum(
        min(_main_memory_bytes(operand), _touched_by_all(module, inner, parameter.name))
        for operand, parameter in zip(operands, inner.parameters, strict=True)
        if _main_memory_bytes(operand)
    )
    root = inner[inner.root]
    if _is_free_call(root):
        return read
    outputs = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(outputs) != len(results):
        return read + _main_memory_bytes(results)
    written = (
        min(_main_memory_bytes([result]), _written(inner, output))
        for result, output in zip(results, outputs, strict=True)
    )
    return read + sum(written)


def touched(module: Module, computation: Computation, name: str, user: Instruction) -> int:
    """Bytes of the array `name` that one of its users reads; 0 if it only overwrites the array."""
    if user.opcode in _READS_SLICES and user.operands[0] == name:
        return user.array.bytes
    if user.opcode == "bitcast":
        return _touched_by_all(module, computation, user.name)
    if user.opcode == "fusion":
        inner = module[user.called("calls") or ""]
        # The users of a fused bitcast read the array itself.
        if all(part.opcode in ("parameter", "bitcast") for part in inner):
            return _touched_by_all(module, computation, user.name)
        return sum(
            _touched_by_all(module, inner, inner.parameters[i].name)
            for i, used in enumerate(user.operands)
            if used == name
        )
    if (user.opcode == "dynamic-update-slice" and user.operands[0] == name) or _touches_nothing(
        user
    ):
        return 0
    return sum(leaf.bytes for leaf in leaves(computation[name].shape))


def _touched_by_all(module: Module, computation: Computation, name: str) -> int:
    return sum(touched(module, computation, name, user) for user in computation.users(name))


def _written(computation: Computation, output: Instruction) -> int:
    """Bytes of one of its results that a fused computation writes."""
    while output.opcode == "bitcast":
        output = computation[output.operands[0]]
    if output.opcode == "dynamic-update-slice":
        return computation[output.operands[1]].array.bytes
    if output.opcode == "parameter" or _touches_nothing(output):
        return 0
    return sum(leaf.bytes for leaf in leaves(output.shape))


def _touches_nothing(instruction: Instruction) -> bool:
    """Whether an instruction of a fused computation reads and writes no memory that counts."""
    return instruction.opcode in ("tuple", *collectives.KINDS) or _is_free_call(instruction)


def _is_free_call(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and any(
        f'custom_call_target="{name}"' in instruction.attributes for name in _FREE_CALLS
    )


def _main_memory_bytes(shapes: list[Shape]) -> int:
    """Bytes of the arrays that are in main memory."""
    return sum(shape.bytes for shape in shapes if shape.space == 0)
