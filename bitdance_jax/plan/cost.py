"""What every instruction of a compiled program costs: how often it runs, its arithmetic, the memory it touches, what it sends.

A call of the program runs its entry's instructions once and those of a loop's body as often as the loop turns. An instruction here is
what the device runs as one kernel: a fusion is one instruction. Bytes are those that cross between main memory and the chip: a fusion's
operands and results, whole, or the slices that it reads or writes of them; what a TPU keeps in its vector memory counts nothing, nor what
exchanges read and write, whose time is counted as such.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from bitdance_jax.plan import collectives
from bitdance_jax.plan.collectives import Collective
from bitdance_jax.plan.hlo import Computation, Instruction, Module, Shape, leaves
from bitdance_jax.plan.hlo_flops import flops, passes


_FREE = {
    *(
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "add-dependency",
        "opt-barrier",
    ),
    *("partition-id", "replica-id", "while", "call", "conditional", "async-start", "async-update"),
}
_FREE_CALLS = (
    *("AsyncCollectiveStart", "AsyncCollectiveDone"),
    *(
        "AllocateBuffer",
        "ConcatBitcast",
        "Sharding",
        "SPMDFullToShardShape",
        "SPMDShardToFullShape",
    ),
)
_READS_SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Cost:
    """One instruction's cost in one call of the program; figures are of a single execution.

    Attributes:
      instruction, computation: what, and where it stands.
      trips: executions in one call.
      looped: stands in a loop.
      flops: operations of products.
      passes: see `hlo_flops.passes`.
      bytes: read from and written to main memory.
      cycles: the TPU compiler's own estimate; 0 where it gives none.
      collectives: exchanges that it makes.
      op_name: the JAX operation that it comes from, or, where the compiler names none, one that it holds or that makes what it reads.
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


def costs(module: Module, devices: int, turns: int | None = None) -> list[Cost]:
    """Of every instruction that a call of the program runs, for programs that run on `devices` devices.

    `turns` are those of the loop, if there is one, whose bound only the call knows.
    """
    return list(_walk(module, module[module.entry], devices, 1, False, turns))


def _walk(
    module: Module,
    computation: Computation,
    devices: int,
    trips: int,
    looped: bool,
    turns: int | None,
) -> Iterator[Cost]:
    channels: set[str] = set()
    for instruction in computation:
        if instruction.opcode == "while":
            body = module[instruction.called("body") or ""]
            yield from _walk(
                module,
                body,
                devices,
                trips * trip_count(module, computation, instruction, turns),
                True,
                turns,
            )
        elif instruction.opcode == "conditional":
            taken = [
                list(_walk(module, branch, devices, trips, looped, turns))
                for branch in branches(module, instruction)
            ]
            yield from max(taken, key=lambda rows: sum(row.flops * row.trips for row in rows))
        elif instruction.opcode in ("call", "async-start"):
            name = instruction.called("to_apply") or instruction.called("calls") or ""
            yield from _walk(module, module[name], devices, trips, looped, turns)
        elif instruction.opcode not in _FREE:
            sent = collectives.find(module, computation, instruction, devices)
            # A TPU hides one exchange behind several fusions, each of which holds it; they share its channel.
            fresh = tuple(part for part in sent if not part.channel or part.channel not in channels)
            channels.update(part.channel for part in fresh)
            yield Cost(
                instruction,
                computation,
                trips,
                looped,
                flops(module, computation, instruction),
                passes(module, computation, instruction),
                memory_bytes(module, computation, instruction),
                int(instruction.attribute(r'"estimated_cycles":"(\d+)"') or 0),
                fresh,
                _op_name(module, computation, instruction),
            )


def _op_name(module: Module, computation: Computation, instruction: Instruction) -> str:
    inside = module[instruction.called("calls") or ""] if instruction.opcode == "fusion" else ()
    makers = (computation[name] for name in instruction.operands)
    return next((part.op_name for part in (instruction, *inside, *makers) if part.op_name), "")


def branches(module: Module, instruction: Instruction) -> list[Computation]:
    """Of a conditional."""
    listed = instruction.attribute(r"branch_computations=\{([^}]*)\}")
    names = re.findall(r"%([\w.\-]+)", listed or "") or [
        instruction.called(f"{which}_computation") or "" for which in ("true", "false")
    ]
    return [module[name] for name in names]


def trip_count(
    module: Module, computation: Computation, loop: Instruction, turns: int | None = None
) -> int:
    """How often a loop turns: what the compiler notes, or else the bound that its condition compares a counter with, or else `turns`.

    Raises:
      ValueError: none of them is there; the program has a loop that ends when its data say so.
    """
    noted = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
    if noted is not None:
        return int(noted)
    condition, start = module[loop.called("condition") or ""], computation[loop.operands[0]]
    compare = condition[condition.root]
    counter, bound = (
        (condition[name] for name in compare.operands)
        if compare.opcode == "compare"
        else (compare, compare)
    )
    if (
        counter.opcode == "get-tuple-element"
        and start.opcode == "tuple"
        and compare.attribute(r"direction=(LT)")
    ):
        place = _place(counter)
        first = _constant(computation, start.operands[place])
        last = (
            _constant(computation, start.operands[_place(bound)])
            if bound.opcode == counter.opcode
            else _constant(condition, bound.name)
        )
        if first is not None and last is not None:
            return -(-(last - first) // _step(module[loop.called("body") or ""], place))
    if turns is None:
        raise ValueError(f"the loop {loop.name} ({loop.op_name}) has no trip count to count by")
    return turns


def _place(element: Instruction) -> int:
    """Which part of a tuple a get-tuple-element takes."""
    return int(element.attribute(r"index=(\d+)") or 0)


def _step(body: Computation, place: int) -> int:
    """What a turn adds to the counter at a place of the loop's state. Unrolled loops add more than 1."""
    added = body[body[body.root].operands[place]]
    while added.opcode in ("copy", "bitcast"):
        added = body[added.operands[0]]
    steps = (
        [step for name in added.operands if (step := _constant(body, name))]
        if added.opcode == "add"
        else []
    )
    return steps[0] if steps else 1


def _constant(computation: Computation, name: str) -> int | None:
    instruction = computation[name]
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.argument):
        return int(instruction.argument)
    return (
        _constant(computation, instruction.operands[0])
        if instruction.opcode in ("copy", "bitcast", "convert")
        else None
    )


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
        return _held(results[:2])
    if base == "dynamic-update-slice":
        return 2 * _held(operands[1])
    if base in _READS_SLICES:
        moved = results[1] if opcode.endswith("-start") else results[0]
        return _held([moved]) + (moved.bytes if _held(operands[0]) else 0)
    if opcode == "fusion":
        return _fusion_bytes(module, instruction, results, operands)
    return _held(results) + sum(map(_held, operands))


def _fusion_bytes(
    module: Module, instruction: Instruction, results: list[Shape], operands: list[list[Shape]]
) -> int:
    inner = module[instruction.called("calls") or ""]
    read = sum(
        min(_held(operand), _touched_by_all(module, inner, parameter.name))
        for operand, parameter in zip(operands, inner.parameters, strict=True)
        if _held(operand)
    )
    root = inner[inner.root]
    if _is_free_call(root):
        return read
    outputs = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(outputs) != len(results):
        return read + _held(results)
    written = (
        min(_held([result]), _written(inner, output))
        for result, output in zip(results, outputs, strict=True)
    )
    return read + sum(written)


def touched(module: Module, computation: Computation, name: str, user: Instruction) -> int:
    """Bytes of the array `name` that one of its users reads; 0 if it only writes over it."""
    if user.opcode in _READS_SLICES and user.operands[0] == name:
        return user.array.bytes
    if user.opcode == "bitcast":
        return _touched_by_all(module, computation, user.name)
    if user.opcode == "fusion":
        inner = module[user.called("calls") or ""]
        if all(
            part.opcode in ("parameter", "bitcast") for part in inner
        ):  # what reads its result reads the array
            return _touched_by_all(module, computation, user.name)
        return sum(
            _touched_by_all(module, inner, inner.parameters[i].name)
            for i, used in enumerate(user.operands)
            if used == name
        )
    if (user.opcode == "dynamic-update-slice" and user.operands[0] == name) or _hands_on(user):
        return 0
    return sum(leaf.bytes for leaf in leaves(computation[name].shape))


def _touched_by_all(module: Module, computation: Computation, name: str) -> int:
    return sum(touched(module, computation, name, user) for user in computation.users(name))


def _written(computation: Computation, output: Instruction) -> int:
    """Bytes that a fused computation writes of one of its results."""
    while output.opcode == "bitcast":
        output = computation[output.operands[0]]
    if output.opcode == "dynamic-update-slice":
        return computation[output.operands[1]].array.bytes
    if output.opcode == "parameter" or _hands_on(output):
        return 0
    return sum(leaf.bytes for leaf in leaves(output.shape))


def _hands_on(instruction: Instruction) -> bool:
    """Whether an instruction of a fused computation reads and writes nothing itself; exchanges have a time of their own."""
    return instruction.opcode in ("tuple", *collectives.KINDS) or _is_free_call(instruction)


def _is_free_call(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and any(
        f'custom_call_target="{name}"' in instruction.attributes for name in _FREE_CALLS
    )


def _held(shapes: list[Shape]) -> int:
    """Bytes of the arrays that lie in main memory."""
    return sum(shape.bytes for shape in shapes if shape.space == 0)
