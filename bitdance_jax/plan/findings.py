"""What takes longest in a compiled program and what may be wasted, with the JAX operations."""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from bitdance_jax.nn.quantize import num_bytes
from bitdance_jax.perf.hardware import Chip
from bitdance_jax.plan.collectives import Collective
from bitdance_jax.plan.cost import Cost, touched
from bitdance_jax.plan.estimate import compiler_seconds, seconds
from bitdance_jax.plan.hlo import Module, leaves


SMALL = 2**20
"""Bytes in a call below which an array or its padding is not listed."""

_WRAPPERS = re.compile(
    r"while|body|cond|closed_call|eval_jaxpr|checkpoint|remat\w*|shard_map|map|<lambda>"
    r"|\w*jit\(.*|\w*vmap\(.*|jvp\(.*|transpose\(.*"
)
_COPIES = {"copy", "transpose", "convert", "reshape"}
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
    """All kernels of one kind and one JAX operation in one call on one device.

    Attributes:
      what: the kind, for example "all-gather over fsdp".
      shape: of the largest result.
      times: executions.
      bytes: the sum of what the function that made the finding says.
      seconds: by the roofline or the TPU compiler's estimate, whichever is longer.
      source: the JAX operation, see `source`.
    """

    what: str
    shape: str
    times: int
    bytes: int
    seconds: float
    source: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class _Kernel(NamedTuple):
    """One kernel of a finding: `bytes` and `seconds` are of one execution."""

    what: str
    row: Cost
    bytes: int
    seconds: float
    source: str


def slowest_modules(rows: list[Cost], chip: Chip, count: int) -> list[Finding]:
    """The parts of the model whose kernels take longest, three levels deep; bytes are touched."""

    def module_name(row: Cost) -> str:
        return "/".join(source(row).split("/")[:-1][:3]) or "(outside of any module)"

    kernels = (
        _Kernel("kernels", row, row.bytes, _longer_seconds(row, chip), module_name(row))
        for row in rows
    )
    return _slowest(kernels, count)


def slowest_kernels(rows: list[Cost], chip: Chip, count: int) -> list[Finding]:
    """The kernels that take longest; bytes are read from and written to memory."""
    kernels = (
        _Kernel(_kind(row), row, row.bytes, _longer_seconds(row, chip), source(row)) for row in rows
    )
    return _slowest(kernels, count)


def slowest_collectives(
    rows: list[Cost], mesh: jax.sharding.Mesh, chip: Chip, count: int
) -> list[Finding]:
    """The collectives that take longest, by kind and mesh axes; bytes are sent by a device."""
    kernels = (_collective(part, row, mesh, chip) for row in rows for part in row.collectives)
    return _slowest(kernels, count)


def missed_reduce_scatters(
    module: Module, rows: list[Cost], mesh: jax.sharding.Mesh, chip: Chip, count: int
) -> list[Finding]:
    """All-reduces of which each device uses only a shard; bytes are sent by a device."""
    kernels = (
        _collective(part, row, mesh, chip)
        for row in rows
        for part in row.collectives
        if part.kind == "all-reduce"
        and part.size > 1
        and _is_sliced(module, row, part.bytes // part.size)
    )
    return _slowest(kernels, count)


def copies_in_loops(module: Module, rows: list[Cost], chip: Chip, count: int) -> list[Finding]:
    """Copies, transposes and conversions in every iteration of a loop; bytes are of the results."""
    kernels = (
        _Kernel(_kind(row), row, _result_bytes(row), _longer_seconds(row, chip), source(row))
        for row in rows
        if row.looped and _only_copies(module, row)
    )
    return _slowest(kernels, count)


def padded_arrays(rows: list[Cost], chip: Chip, count: int) -> list[Finding]:
    """Arrays that are at least half padding to a TPU's tiles; bytes are of the padding written."""

    def padding(row: Cost) -> int:
        arrays = [leaf for leaf in leaves(row.instruction.shape) if leaf.space == 0 and row.bytes]
        padded = [leaf for leaf in arrays if leaf.bytes >= 2 * leaf.logical_bytes]
        return sum(leaf.bytes - leaf.logical_bytes for leaf in padded)

    kernels = (
        _Kernel(_kind(row), row, size, size / chip.bandwidth, source(row))
        for row in rows
        if (size := padding(row))
    )
    return [finding for finding in _slowest(kernels, count) if finding.bytes >= SMALL]


def largest_arrays(rows: list[Cost], count: int) -> list[Finding]:
    """The largest results of kernels in main memory, one of each shape; bytes are of one array."""
    largest: dict[str, Finding] = {}
    for row in rows:
        for leaf in leaves(row.instruction.shape):
            if row.bytes and leaf.space == 0 and leaf.bytes >= SMALL:
                shape = str(leaf)
                first = Finding(_kind(row), shape, 0, leaf.bytes, 0.0, source(row))
                seen = largest.setdefault(shape, first)
                largest[shape] = dataclasses.replace(seen, times=seen.times + row.trips)
    return sorted(largest.values(), key=lambda finding: -finding.bytes)[:count]


def replicated_arguments(arguments: Any, count: int) -> list[Finding]:
    """Arguments that are replicated on several devices, largest first."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
        sharding = leaf.sharding
        if sharding is None or sharding.num_devices == 1 or not sharding.is_fully_replicated:
            continue
        size = int(num_bytes(leaf))
        if size >= SMALL:
            shape = f"{leaf.dtype}{list(leaf.shape)}"
            found.append(Finding("argument", shape, 1, size, 0.0, jax.tree_util.keystr(path)))
    return sorted(found, key=lambda finding: -finding.bytes)[:count]


def source(row: Cost) -> str:
    """The JAX operation and its modules, such as "backward transformer/layers/mlp/w1/dot_general".

    "recomputed" means rematerialization. Loops, transformations and layer numbers are omitted.
    """
    name = row.op_name.split(";")[0]
    steps = [step for step in name.split("/") if step and not _WRAPPERS.fullmatch(step)]
    # A method's scope is "module.method", or "Class.method" if the module has no name.
    steps = [
        re.sub(r"_\d+$", "_*", step.split(".")[0])
        for step in steps
        if not re.match(r"[A-Z]\w*\.", step)
    ]
    if not steps:
        return f"({row.instruction.opcode})"
    if "rematted_computation" in name:
        return "recomputed " + "/".join(steps)
    return ("backward " if "transpose(" in name else "") + "/".join(steps)


def _slowest(kernels: Iterable[_Kernel], count: int) -> list[Finding]:
    """The findings that take longest."""
    groups: dict[tuple[str, str], list[_Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.what, kernel.source), []).append(kernel)
    findings = map(_sum, groups.values())
    slow = [finding for finding in findings if finding.seconds > 0]
    return sorted(slow, key=lambda finding: -finding.seconds)[:count]


def _sum(kernels: list[_Kernel]) -> Finding:
    shapes = [leaf for kernel in kernels for leaf in leaves(kernel.row.instruction.shape)]
    return Finding(
        what=kernels[0].what,
        shape=str(max(shapes, key=lambda leaf: leaf.bytes)),
        times=sum(kernel.row.trips for kernel in kernels),
        bytes=sum(kernel.row.trips * kernel.bytes for kernel in kernels),
        seconds=sum(kernel.row.trips * kernel.seconds for kernel in kernels),
        source=kernels[0].source,
    )


def _longer_seconds(row: Cost, chip: Chip) -> float:
    return max(seconds(row, chip), compiler_seconds(row, chip))


def _collective(part: Collective, row: Cost, mesh: jax.sharding.Mesh, chip: Chip) -> _Kernel:
    axes = "+".join(part.axes(mesh)) or "no axis"
    what = f"{part.kind} over {axes}"
    return _Kernel(what, row, part.sent, part.seconds(mesh, chip), source(row))


def _kind(row: Cost) -> str:
    """The opcode; for a fusion the compiler's name, which lists its operations."""
    if row.instruction.opcode == "fusion":
        return re.sub(r"[.\d]+$", "", row.instruction.name)
    return row.instruction.opcode


def _result_bytes(row: Cost) -> int:
    return sum(leaf.bytes for leaf in leaves(row.instruction.shape))


def _only_copies(module: Module, row: Cost) -> bool:
    if row.instruction.opcode != "fusion":
        return row.instruction.opcode in _COPIES
    inner = {part.opcode for part in module[row.instruction.called("calls") or ""]}
    return inner <= _COPIES | _TRIVIAL and bool(inner & _COPIES)


def _is_sliced(module: Module, row: Cost, size: int) -> bool:
    """Whether every user of a row's result reads at most `size` bytes of it."""
    name = row.instruction.name
    users = row.computation.users(name)
    return bool(users) and all(
        0 < touched(module, row.computation, name, user) <= size for user in users
    )
