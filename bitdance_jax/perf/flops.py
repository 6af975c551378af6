"""Floating-point operations of a traced program, loops counted in full.

XLA's own cost analysis counts a loop's body once; walking the jaxpr counts it as often as it runs. Only products are counted (dot_general
and convolutions): 2 for each multiply-add.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval


def traced_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Operations of the products in `function(*arguments)`; the arguments may be jax.ShapeDtypeStruct.

    Products whose results nothing uses do not count: compilers leave them out.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _jaxpr_flops(used)


def _jaxpr_flops(jaxpr: Jaxpr) -> int:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return (
            2
            * equation.outvars[0].aval.size
            * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        )
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        return (
            2
            * equation.outvars[0].aval.size
            * kernel.size
            // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        )
    if name == "while":
        raise ValueError("a while loop has no trip count to count by; write it as a scan")
    inner = [_jaxpr_flops(j) for j in _inner_jaxprs(params)]
    if name == "cond":
        return max(inner)
    return params.get("length", 1) * sum(inner) if name == "scan" else sum(inner)


def _inner_jaxprs(params: dict[str, Any]) -> list[Jaxpr]:
    values = [
        v
        for value in params.values()
        for v in (value if isinstance(value, tuple | list) else [value])
    ]
    return [
        v.jaxpr if isinstance(v, ClosedJaxpr) else v
        for v in values
        if isinstance(v, ClosedJaxpr | Jaxpr)
    ]
