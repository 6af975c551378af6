"""Floating-point operations of a traced program.

XLA's own cost analysis counts a loop's body once; here it counts as often as it runs. Only matrix
products and convolutions count: 2 operations for each multiply-add.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval


def traced_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Operations of `function(*arguments)`; the arguments may be jax.ShapeDtypeStruct.

    Products whose results are not used do not count, because compilers remove them.

    Raises:
      ValueError: the function contains a while loop, whose number of iterations is unknown.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _jaxpr_flops(used)


def _jaxpr_flops(jaxpr: Jaxpr) -> int:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: Any) -> int:
    name = equation.primitive.name
    params = equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = equation.invars[0].aval
        terms = math.prod(lhs.shape[axis] for axis in contracted)
        return 2 * equation.outvars[0].aval.size * terms
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * kernel.size // outputs
    if name == "while":
        raise ValueError("a while loop has no known number of iterations; write it as a scan")
    inner = [_jaxpr_flops(inner_jaxpr) for inner_jaxpr in _inner_jaxprs(params)]
    if name == "cond":
        return max(inner)
    return params.get("length", 1) * sum(inner) if name == "scan" else sum(inner)


def _inner_jaxprs(params: dict[str, Any]) -> list[Jaxpr]:
    values: list[Any] = []
    for value in params.values():
        values += value if isinstance(value, tuple | list) else [value]
    return [
        value.jaxpr if isinstance(value, ClosedJaxpr) else value
        for value in values
        if isinstance(value, ClosedJaxpr | Jaxpr)
    ]
