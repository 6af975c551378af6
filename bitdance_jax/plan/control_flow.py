"""Branches and loops of a compiled program: which computations they run, and how often."""

import re

from bitdance_jax.plan.hlo import Computation, Instruction, Module


def branches(module: Module, instruction: Instruction) -> list[Computation]:
    """The computations of a conditional."""
    listed = instruction.attribute(r"branch_computations=\{([^}]*)\}")
    names = re.findall(r"%([\w.\-]+)", listed or "")
    if not names:
        names = [instruction.called(f"{which}_computation") or "" for which in ("true", "false")]
    return [module[name] for name in names]


def trip_count(
    module: Module, computation: Computation, loop: Instruction, default: int | None = None
) -> int:
    """The number of iterations of a loop.

    The compiler may note it. Otherwise it follows from the constants of a condition "counter <
    bound", or else it is `default`.

    Raises:
      ValueError: the number depends on the program's arguments, and there is no default.
    """
    noted = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
    if noted is not None:
        return int(noted)
    condition = module[loop.called("condition") or ""]
    start = computation[loop.operands[0]]
    compare = condition[condition.root]
    if (
        compare.opcode == "compare"
        and compare.attribute(r"direction=(LT)")
        and start.opcode == "tuple"
    ):
        counter, bound = (condition[name] for name in compare.operands)
        if counter.opcode == "get-tuple-element":
            index = _tuple_index(counter)
            first = _constant(computation, start.operands[index])
            if bound.opcode == "get-tuple-element":
                last = _constant(computation, start.operands[_tuple_index(bound)])
            else:
                last = _constant(condition, bound.name)
            if first is not None and last is not None:
                return -(-(last - first) // _step(module[loop.called("body") or ""], index))
    if default is None:
        raise ValueError(
            f"the loop {loop.name} ({loop.op_name}) has no known number of iterations; "
            "give the program's `trips`"
        )
    return default


def _tuple_index(element: Instruction) -> int:
    """Of a get-tuple-element."""
    return int(element.attribute(r"index=(\d+)") or 0)


def _step(body: Computation, index: int) -> int:
    """The increment of the counter at an index of the loop's state; above 1 if it is unrolled."""
    added = body[body[body.root].operands[index]]
    while added.opcode in ("copy", "bitcast"):
        added = body[added.operands[0]]
    if added.opcode != "add":
        return 1
    return next((step for name in added.operands if (step := _constant(body, name))), 1)


def _constant(computation: Computation, name: str) -> int | None:
    """The value of an integer constant, possibly copied or converted; None for anything else."""
    instruction = computation[name]
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.argument):
        return int(instruction.argument)
    if instruction.opcode in ("copy", "bitcast", "convert"):
        return _constant(computation, instruction.operands[0])
    return None
