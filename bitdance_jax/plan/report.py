"""A plan as tables, for people and for README files, and as JSON-ready data."""

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
    """Markdown: what the program needs and takes, and the `count` first places of each list of `findings`."""
    program = plan.program
    mesh = " x ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
    kind = program.mesh.devices.flat[0].device_kind
    lines = [
        f"{program.name}, {program.images} images, {program.mesh.size} x {kind}, mesh {mesh}; compiled in {plan.compile_seconds:.0f} s"
    ]
    lines += ["", *_memory(plan), "", *_times(plan)]
    for title, found in _findings(plan, count).items():
        lines += ["", f"{title}:", "", *_finding_table(found)] if found else []
    return "\n".join(lines)


def ranking(plans: Sequence[tuple[str, Plan]]) -> list[str]:
    """Lines of a table of several plans."""
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
    return table(
        ["", "GiB", *(word for name in bounds for word in (f"{name}, s", "images/s", "MFU"))], rows
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose columns are aligned; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(
                c.rjust(w) if i else c.ljust(w)
                for i, (c, w) in enumerate(zip(cells, widths, strict=True))
            )
            + " |"
        )

    return [
        line(head),
        "|" + "|".join("-" * (w + 1) + ("-" if not i else ":") for i, w in enumerate(widths)) + "|",
        *map(line, rows),
    ]


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    parts = {
        "arguments": memory.arguments,
        "outputs that replace no argument": memory.outputs - memory.aliased,
        "temporaries": memory.temporaries,
        "program": memory.code,
        "in all": memory.total,
    }
    rows = [(name, f"{size / GIB:.2f}") for name, size in parts.items()]
    return table(
        ("memory of a device", "GiB"),
        [*rows, ("the device has", f"{plan.chip.memory / GIB:.2f}")] if plan.chip else rows,
    )


def _times(plan: Plan) -> list[str]:
    estimate, chip = plan.estimate, plan.chip
    repeated = plan.flops * plan.program.mesh.size / max(plan.program.model_flops, 1)
    lines = [
        f"arithmetic: {plan.flops / 1e12:.3f} TFLOP a device, {repeated:.3f} times the model's own; {_executed(plan):,} kernels"
    ]
    if estimate is None or chip is None:
        return [
            *lines,
            "times are not estimated: the figures of this device are not known (bitdance_jax/perf/hardware.py)",
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
        "overlapped": "at best: all overlaps",
        "scheduled": "roofline, copies ahead overlap",
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
        *table(("each by itself", "s"), alone),
        "",
        *table(("a call", "s", "images/s", "model FLOP utilisation"), bounds),
    ]


def _executed(plan: Plan) -> int:
    return sum(row.trips for row in plan.rows)


def _findings(plan: Plan, count: int) -> dict[str, list[Finding]]:
    rows, mesh, module = plan.rows, plan.program.mesh, plan.module
    found = {
        "Largest arrays in memory": findings.largest_results(rows, count),
        "Arguments that every device holds whole": findings.replicated_arguments(
            plan.program.arguments, count
        ),
    }
    if plan.chip is None:
        return found
    return {
        "Parts of the model": findings.parts(rows, plan.chip, count),
        "Kernels": findings.kernels(rows, plan.chip, count),
        "Exchanges": findings.exchanges(rows, mesh, plan.chip, count),
        "Sums of which each device keeps a part (reduce-scatters missed)": findings.reductions_then_cut(
            module, rows, mesh, plan.chip, count
        ),
        "Copies and conversions in loops": findings.moves_in_loops(module, rows, plan.chip, count),
        "Padding": findings.padding(rows, plan.chip, count),
        **found,
    }


def _finding_table(findings: list[Finding]) -> list[str]:
    head = ["from", "what", "largest result", "times", "MiB"]
    rows = [
        [f.source[-90:], f.what[:36], f.shape, f"{f.times:,}", f"{f.bytes / 2**20:,.1f}"]
        for f in findings
    ]
    if any(f.seconds for f in findings):  # none is known of arrays, nor of devices without figures
        head.append("ms")
        rows = [[*row, f"{f.seconds * 1e3:,.2f}"] for row, f in zip(rows, findings, strict=True)]
    return table(head, rows)
