"""Inspects traced programs."""

from collections.abc import Iterator
from typing import Any, NamedTuple


class Operation(NamedTuple):
    """One equation of a program.

    Attributes:
      equation: the equation.
      times: how often a run executes it: the product of the lengths of the scans around it.
    """

    equation: Any
    times: int


def operations(closed_jaxpr: Any) -> Iterator[Operation]:
    """Every equation, those of inner programs (jit, scan, ...) included."""
    return _operations(closed_jaxpr.jaxpr, 1)


def products_with(closed_jaxpr: Any, kernel_shape: tuple[int, ...]) -> list[int]:
    """How often each product with a weight of this shape runs."""
    return [
        times
        for equation, times in operations(closed_jaxpr)
        if equation.primitive.name == "dot_general"
        and equation.invars[1].aval.shape == kernel_shape
    ]


def largest_intermediate(closed_jaxpr: Any) -> int:
    """Number of elements of the largest array that an equation computes."""
    return max(
        variable.aval.size
        for equation, _ in operations(closed_jaxpr)
        for variable in equation.outvars
    )


def _operations(jaxpr: Any, times: int) -> Iterator[Operation]:
    for equation in jaxpr.eqns:
        yield Operation(equation, times)
        inner_times = (
            times * equation.params["length"] if equation.primitive.name == "scan" else times
        )
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from _operations(inner, inner_times)
