"""A plan as Markdown tables and as JSON-ready data."""

from collections.abc import Sequence
from typing import Any

from bitdance_jax.plan import findings
from bitdance_jax.plan.analysis import Plan
from bitdance_jax.plan.findings import Finding


GIB = 2**30


def to_dict(plan: Plan, count: int) -> dict[str, Any]:
    """Everything that `to_text` shows, as JSON-ready data."""
    return {
        **plan.to_dict(),
        "findings": {
            title: [finding.to_dict() for finding in found]
            for title, found in _findings(plan, count).items()
        },
    }


def to_text(plan: Plan, count: int) -> str:
    """Markdown tables of memory, times, and the first `count` rows of each list of `findings`."""
    program = plan.program
    mesh = " x ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
    kind = program.mesh.devices.flat[0].device_kind
    lines = [
        f"{program.name}, {program.images} images, {program.mesh.size} x {kind}, mesh {mesh}; "
        f"compiled in {plan.compile_seconds:.0f} s"
    ]
    lines += ["", *_memory(plan), "", *_times(plan)]
    for title, found in _findings(plan, count).items():
        lines += ["", f"{title}:", "", *_finding_table(found)] if found else []
    return "\n".join(lines)


def ranking(plans: Sequence[tuple[str, Plan]]) -> list[str]:
    """Lines of a table that compares several plans."""
    rows = []
    for name, plan in plans:
        cells = [name, f"{plan.memory.total / GIB:.1f}"]
        for seconds in plan.estimate.bounds.values() if plan.estimate else ():
            cells += [
                f"{seconds:.4f}",
                f"{plan.images_per_second(seconds):.0f}",
                f"{plan.utilisation(seconds):.1%}",
            ]
        rows.append(cells)
    bounds = plans[0][1].estimate.bounds if plans[0][1].estimate else ()
    head = ["", "GiB"]
    for name in bounds:
        head += [f"{name}, s", "images/s", "MFU"]
    return table(head, rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, the first column aligned to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([first, *others])} |"

    rule = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    return [line(head), f"|{'|'.join(rule)}|", *map(line, rows)]


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    parts: dict[str, float] = {
        "arguments": memory.arguments,
        "outputs outside of donated arguments": memory.outputs - memory.aliased,
        "temporaries": memory.temporaries,
        "program": memory.code,
        "total": memory.total,
    }
    if plan.chip:
        parts["available"] = plan.chip.memory
    rows = [(name, f"{size / GIB:.2f}") for name, size in parts.items()]
    return table(("memory of a device", "GiB"), rows)


def _times(plan: Plan) -> list[str]:
    estimate = plan.estimate
    chip = plan.chip
    repeated = plan.flops * plan.program.mesh.size / max(plan.program.model_flops, 1)
    executed = sum(row.trips for row in plan.rows)
    lines = [
        f"arithmetic: {plan.flops / 1e12:.3f} TFLOP a device, {repeated:.3f} times the model's; "
        f"{executed:,} kernels"
    ]
    if estimate is None or chip is None:
        return [
            *lines,
            "no times: this device is not in the table of bitdance_jax/perf/hardware.py",
        ]
    alone = [
        (f"arithmetic at {chip.flops / 1e12:.0f} TFLOP/s", f"{estimate.arithmetic:.4f}"),
        (
            f"{estimate.bytes / GIB:.1f} GiB through memory at {chip.bandwidth / 1e9:.0f} GB/s",
            f"{estimate.memory:.4f}",
        ),
        (f"{estimate.sent / GIB:.3f} GiB sent", f"{estimate.communication:.4f}"),
    ]
    names = {
        "overlapped": "roofline, everything overlaps",
        "scheduled": "roofline, asynchronous copies overlap",
        "serial": "roofline, nothing overlaps",
        "compiler": "compiler's estimate, nothing overlaps",
    }
    bounds = [
        (
            names[name],
            f"{seconds:.4f}",
            f"{plan.images_per_second(seconds):.1f}",
            f"{plan.utilisation(seconds):.1%}",
        )
        for name, seconds in estimate.bounds.items()
    ]
    return [
        *lines,
        "",
        *table(("each alone", "s"), alone),
        "",
        *table(("a call", "s", "images/s", "model FLOP utilisation"), bounds),
    ]


def _findings(plan: Plan, count: int) -> dict[str, list[Finding]]:
    rows = plan.rows
    mesh = plan.program.mesh
    arguments = plan.program.arguments
    found = {
        "Largest arrays in memory": findings.largest_arrays(rows, count),
        "Replicated arguments": findings.replicated_arguments(arguments, count),
    }
    chip = plan.chip
    if chip is None:
        return found
    return {
        "Modules": findings.slowest_modules(rows, chip, count),
        "Kernels": findings.slowest_kernels(rows, chip, count),
        "Collectives": findings.slowest_collectives(rows, mesh, chip, count),
        "All-reduces that could be reduce-scatters": findings.missed_reduce_scatters(
            plan.module, rows, mesh, chip, count
        ),
        "Copies and conversions in loops": findings.copies_in_loops(plan.module, rows, chip, count),
        "Padding": findings.padded_arrays(rows, chip, count),
        **found,
    }


def _finding_table(findings: list[Finding]) -> list[str]:
    head = ["operation", "what", "largest result", "times", "MiB"]
    rows = [
        [f.source[-90:], f.what[:36], f.shape, f"{f.times:,}", f"{f.bytes / 2**20:,.1f}"]
        for f in findings
    ]
    if any(f.seconds for f in findings):  # Arrays have no time.
        head.append("ms")
        rows = [[*row, f"{f.seconds * 1e3:,.2f}"] for row, f in zip(rows, findings, strict=True)]
    return table(head, rows)
