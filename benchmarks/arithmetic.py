"""Floating-point operations of a traced program, loops counted in full, and the fewest that the sampler needs.

XLA's own cost analysis counts a loop's body once; walking the jaxpr counts it as often as it runs. Only products are counted (dot_general
and convolutions): 2 for each multiply-add.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from bitdance_jax.config import ClassConditionalConfig, SamplerConfig


def traced_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Operations of the products in `function(*arguments)`; the arguments may be jax.ShapeDtypeStruct."""
    return _jaxpr_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _jaxpr_flops(jaxpr: Jaxpr) -> int:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * equation.outvars[0].aval.size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        return 2 * equation.outvars[0].aval.size * kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    if name == "while":
        raise ValueError("a while loop has no trip count to count by; write it as a scan")
    inner = [_jaxpr_flops(j) for j in _inner_jaxprs(params)]
    if name == "cond":
        return max(inner)
    return params.get("length", 1) * sum(inner) if name == "scan" else sum(inner)


def _inner_jaxprs(params: dict[str, Any]) -> list[Jaxpr]:
    values = [v for value in params.values() for v in (value if isinstance(value, tuple | list) else [value])]
    return [v.jaxpr if isinstance(v, ClosedJaxpr) else v for v in values if isinstance(v, ClosedJaxpr | Jaxpr)]


def minimal_sampler_flops(config: ClassConditionalConfig, sampler: SamplerConfig, batch: int) -> int:
    """Products that drawing `batch` pictures' codes cannot do without: SPEC 2 and 3 counted by hand.

    Every input token goes through every layer once and attends to just what it may see; the head runs for every token at every evaluation,
    its time embedding once for each time, its condition's once for each token.
    """
    rows = batch * (2 if sampler.guidance_scale != 1 else 1)
    bits, patch, tokens = config.tokenizer.bits, config.tokens_per_step, config.num_tokens
    evaluations = sampler.head_steps + (1 if sampler.solver == "euler_maruyama" else 0)

    dim, hidden, layers = config.transformer.dim, config.transformer.hidden_dim, config.transformer.num_layers
    prefix, visual = config.class_tokens + patch - 1, tokens - patch
    weights = layers * (4 * dim * dim + 3 * dim * hidden)
    plain = config.class_tokens - 1
    first_block = plain + patch
    seen = plain * (plain + 1) // 2 + patch * first_block + sum(patch * (first_block + start + patch) for start in range(0, visual, patch))
    transformer = (prefix + visual) * weights + visual * (bits * 3 * dim + 1.5 * dim * dim) + layers * 2 * dim * seen

    width, blocks, groups = config.head.width, config.head.num_blocks, config.head.num_groups
    block = 3 * 1.5 * width * width + (4 * width * width + 2 * width * patch if patch > 1 else 0)
    vectors = 6 if patch > 1 else 3
    evaluation = blocks * block + (groups * vectors + 2) * width * width + 2 * bits * width
    head = tokens * (evaluations * evaluation + dim * width)
    times = evaluations * (256 * width + width * width)
    return int(2 * (rows * (transformer + head) + times))
