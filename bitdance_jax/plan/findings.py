"""Where a compiled program's time goes, and where it spends what it need not; each place with the JAX operation that it comes from."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from bitdance_jax.perf.hardware import Chip
from bitdance_jax.plan.cost import Cost, touched
from bitdance_jax.plan.estimate import compiler_seconds, seconds
from bitdance_jax.plan.hlo import Module, leaves


SMALL = 2**20
"""Bytes in a call below which nothing is worth a line."""

_WRAPPERS = re.compile(
    r"while|body|cond|closed_call|eval_jaxpr|checkpoint|remat\w*|shard_map|map|\w*jit\(.*|\w*vmap\(.*|jvp\(.*|transpose\(.*|<lambda>"
)
_MOVES = {"copy", "transpose", "convert", "reshape"}
_TRIVIAL = {
    "parameter",
    "bitcast",
    "constant",
    "tuple",
    "get-tuple-element",
    "dynamic-slice",
    "slice",
}


@dataclass(frozen=True)
class Finding:
    """Kernels of one kind that come from one JAX operation, added up over one call on one device.

    Attributes:
      what: the kind, for example "all-gather over fsdp".
      shape: of the largest result.
      times: executions.
      bytes: moved, kept or sent, as the list says.
      seconds: by the roofline or the TPU compiler's estimate, whichever is more.
      source: the operation, see `source`.
    """

    what: str
    shape: str
    times: int
    bytes: int
    seconds: float
    source: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def parts(rows: list[Cost], chip: Chip, count: int) -> list[Finding]:
    """The parts of the model whose kernels take longest: the first modules of their operations' names."""

    def part(row: Cost) -> str:
        return "/".join(source(row).split("/")[:-1][:3]) or "(outside of any module)"

    return _longest(
        _added_up(("kernels", row, row.bytes, _slower(row, chip), part(row)) for row in rows), count
    )


def kernels(rows: list[Cost], chip: Chip, count: int) -> list[Finding]:
    """The kernels that take longest."""
    return _longest(
        _added_up((_kind(row), row, row.bytes, _slower(row, chip), source(row)) for row in rows),
        count,
    )


def exchanges(rows: list[Cost], mesh: jax.sharding.Mesh, chip: Chip, count: int) -> list[Finding]:
    """The collectives that take longest, by kind and mesh axes; bytes are those that a device sends."""
    found = (
        (
            f"{part.kind} over {_axes(part, mesh)}",
            row,
            part.sent,
            part.seconds(mesh, chip),
            source(row),
        )
        for row in rows
        for part in row.collectives
    )
    return _longest(_added_up(found), count)


def reductions_then_cut(
    module: Module, rows: list[Cost], mesh: jax.sharding.Mesh, chip: Chip, count: int
) -> list[Finding]:
    """All-reduces of which each device keeps a part: reduce-scatters that the compiler did not see."""
    found = (
        (
            f"all-reduce over {_axes(part, mesh)}",
            row,
            part.sent,
            part.seconds(mesh, chip),
            source(row),
        )
        for row in rows
        for part in row.collectives
        if part.kind == "all-reduce"
        and part.size > 1
        and _is_cut(module, row, part.bytes // part.size)
    )
    return _longest(_added_up(found), count)


def moves_in_loops(module: Module, rows: list[Cost], chip: Chip, count: int) -> list[Finding]:
    """Copies, transpositions and changes of type that are made anew in every turn of a loop; bytes are those of their results."""
    found = (
        (_kind(row), row, _size(row), _slower(row, chip), source(row))
        for row in rows
        if row.looped and _only_moves(module, row)
    )
    return _longest(_added_up(found), count)


def padding(rows: list[Cost], chip: Chip, count: int) -> list[Finding]:
    """Arrays of main memory that are half or more padding to a TPU's tiles; bytes are those of the padding written."""

    def empty(row: Cost) -> int:
        held = [leaf for leaf in leaves(row.instruction.shape) if leaf.space == 0 and row.bytes]
        return sum(
            leaf.bytes - leaf.logical_bytes for leaf in held if leaf.bytes >= 2 * leaf.logical_bytes
        )

    found = (
        (_kind(row), row, size, size / chip.bandwidth, source(row))
        for row in rows
        if (size := empty(row))
    )
    return [finding for finding in _longest(_added_up(found), count) if finding.bytes >= SMALL]


def largest_results(rows: list[Cost], count: int) -> list[Finding]:
    """The largest arrays that kernels leave in main memory, one of each shape; bytes are those of one."""
    largest: dict[str, Finding] = {}
    for row in rows:
        for leaf in leaves(row.instruction.shape):
            if row.bytes and leaf.space == 0 and leaf.bytes >= SMALL:
                seen = largest.setdefault(
                    str(leaf), Finding(_kind(row), str(leaf), 0, leaf.bytes, 0.0, source(row))
                )
                largest[str(leaf)] = dataclasses.replace(seen, times=seen.times + row.trips)
    return sorted(largest.values(), key=lambda finding: -finding.bytes)[:count]


def replicated_arguments(arguments: Any, count: int) -> list[Finding]:
    """Arguments that every one of several devices holds whole, largest first."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
        place = leaf.sharding
        if (
            place is not None
            and place.num_devices > 1
            and place.is_fully_replicated
            and leaf.size * leaf.dtype.itemsize >= SMALL
        ):
            shape = f"{leaf.dtype}{list(leaf.shape)}"
            found.append(
                Finding(
                    "argument",
                    shape,
                    1,
                    leaf.size * leaf.dtype.itemsize,
                    0.0,
                    jax.tree_util.keystr(path),
                )
            )
    return sorted(found, key=lambda finding: -finding.bytes)[:count]


def source(row: Cost) -> str:
    """The JAX operation with the modules it is in: "backward transformer/layers/mlp/w1/dot_general"; layers' numbers are left out.

    "recomputed" is what rematerialisation computes again. Loops and transformations that say nothing of the model are left out.
    """
    name = row.op_name.split(";")[0]
    steps = [step for step in name.split("/") if step and not _WRAPPERS.fullmatch(step)]
    # A method's scope is the module's name, or its class's where it has none, with the method's.
    steps = [
        re.sub(r"_\d+$", "_*", step.split(".")[0])
        for step in steps
        if not re.match(r"[A-Z]\w*\.", step)
    ]
    when = (
        "recomputed "
        if "rematted_computation" in name
        else "backward "
        if "transpose(" in name
        else ""
    )
    return when + "/".join(steps) if steps else f"({row.instruction.opcode})"


Found = tuple[str, Cost, int, float, str]
"""What, the row, bytes and seconds of one execution, and where from."""


def _added_up(found: Iterable[Found]) -> Iterator[Finding]:
    groups: dict[tuple[str, str], list[Found]] = {}
    for one in found:
        groups.setdefault((one[0], one[4]), []).append(one)
    for (what, where), group in groups.items():
        shapes = [leaf for _, row, _, _, _ in group for leaf in leaves(row.instruction.shape)]
        times = sum(row.trips for _, row, _, _, _ in group)
        size = sum(row.trips * size for _, row, size, _, _ in group)
        yield Finding(
            what,
            str(max(shapes, key=lambda leaf: leaf.bytes)),
            times,
            size,
            sum(r.trips * s for _, r, _, s, _ in group),
            where,
        )


def _longest(findings: Iterable[Finding], count: int) -> list[Finding]:
    return sorted(
        (finding for finding in findings if finding.seconds > 0),
        key=lambda finding: -finding.seconds,
    )[:count]


def _slower(row: Cost, chip: Chip) -> float:
    return max(seconds(row, chip), compiler_seconds(row, chip))


def _axes(part: Any, mesh: jax.sharding.Mesh) -> str:
    return "+".join(part.axes(mesh)) or "no axis"


def _kind(row: Cost) -> str:
    """The opcode; for a fusion the name that the compiler makes of what is in it."""
    return (
        re.sub(r"[.\d]+$", "", row.instruction.name)
        if row.instruction.opcode == "fusion"
        else row.instruction.opcode
    )


def _size(row: Cost) -> int:
    return sum(leaf.bytes for leaf in leaves(row.instruction.shape))


def _only_moves(module: Module, row: Cost) -> bool:
    if row.instruction.opcode != "fusion":
        return row.instruction.opcode in _MOVES
    inner = {part.opcode for part in module[row.instruction.called("calls") or ""]}
    return inner <= _MOVES | _TRIVIAL and bool(inner & _MOVES)


def _is_cut(module: Module, row: Cost, share: int) -> bool:
    """Whether all that use a row's result read no more than a share of it."""
    name = row.instruction.name
    users = row.computation.users(name)
    return bool(users) and all(
        0 < touched(module, row.computation, name, user) <= share for user in users
    )
