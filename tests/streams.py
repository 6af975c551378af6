"""In which types a traced model computes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from bitdance_jax.nn.block import PreNormBlock


class Dtypes(NamedTuple):
    """The names of all types that occurred.

    Attributes:
      stream: of what the transformers' layers read and give.
      norms: of what the transformers' norms read, those of queries and keys aside.
      products: of what their linear layers give.
    """

    stream: set[str]
    norms: set[str]
    products: set[str]


def dtypes(function: Callable[..., Any], *arguments: Any) -> Dtypes:
    """Those of a function that applies models, traced and not run."""
    found = Dtypes(set(), set(), set())

    def spy(
        method: Callable[..., Any], inputs: tuple[Any, ...], keywords: Any, context: Any
    ) -> Any:
        module = context.module
        result = method(*inputs, **keywords)
        if context.method_name != "__call__" or "head" in module.path:
            return result
        if isinstance(module, PreNormBlock):
            found.stream.update((inputs[0].dtype.name, result[0].dtype.name))
        elif isinstance(module, nn.RMSNorm) and module.name not in ("q_norm", "k_norm"):
            found.norms.add(inputs[0].dtype.name)
        elif isinstance(module, nn.Dense | nn.DenseGeneral):
            found.products.add(result.dtype.name)
        return result

    with nn.intercept_methods(spy):
        jax.eval_shape(function, *arguments)
    return found
