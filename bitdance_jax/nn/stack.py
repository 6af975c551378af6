"""Repeated layers in two forms: stacked and scanned (training), or unrolled (sampling).

With scanned layers the compile time does not depend on the depth. With unrolled layers the
sampler's loops need not slice, and so copy, every weight at every step. `stack` and `unstack`
convert parameters between the forms: {"layers": [L, ...]} and {"layers_0": ..., "layers_1": ...}.
"""

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array


STACKED = ("layers", "groups", "blocks")
"""Names of the repeated parts in the parameter trees."""

Params = dict[str, Any]


def remat_policy(name: str) -> Callable[..., bool] | None:
    """What the backward pass of a scanned layer stores.

    "nothing", or "dots": the outputs of products with weights.
    """
    return {"nothing": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}[name]


def stacked(block: type[nn.Module], length: int, remat: str | None) -> Callable[..., nn.Module]:
    """`block` repeated by nn.scan: called as block(carry, *shared) -> (carry, None)."""
    if remat is not None:
        block = nn.remat(block, policy=remat_policy(remat), prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=length,
        in_axes=nn.broadcast,
    )


def repeat(
    block: type[nn.Module], length: int, *, scan: bool, remat: str | None, **fields: Any
) -> Any:
    """`stacked` or a list of `block(**fields)`, for an attribute with a name of STACKED."""
    if scan:
        return stacked(block, length, remat)(**fields)
    return [block(**fields) for _ in range(length)]


def apply_layers(
    layers: Any, x: Array, *shared: Any, cache: list[Any] | None = None, start: Any = 0
) -> tuple[Array, list[Any] | None]:
    """Layers called as layer(x, *shared, cache, start) -> (x, cache), one after the other.

    Args:
      layers: of `repeat`; with a cache, a list.
      x: input of the first layer.
      shared: further arguments of every layer.
      cache: one for each layer.
      start: position of the first token in the cache.
    """
    if not isinstance(layers, list | tuple):
        if cache is not None:
            raise ValueError(
                "scanned layers have no cache; unstack the parameters and use scan=False"
            )
        return layers(x, *shared)
    new_cache = []
    for i, layer in enumerate(layers):
        x, layer_cache = layer(x, *shared, None if cache is None else cache[i], start)
        new_cache.append(layer_cache)
    return x, None if cache is None else new_cache


def unstack(params: Params) -> Params:
    """Scanned parameters in the unrolled form."""
    out: Params = {}
    for name, value in params.items():
        if name in STACKED:
            for i in range(jax.tree.leaves(value)[0].shape[0]):
                out[f"{name}_{i}"] = unstack(jax.tree.map(lambda a, i=i: a[i], value))
        else:
            out[name] = unstack(value) if isinstance(value, dict) else value
    return out


def stack(params: Params) -> Params:
    """Inverse of `unstack`."""
    out: Params = {}
    runs: dict[str, dict[int, Params]] = {}
    for name, value in params.items():
        match = re.fullmatch(rf"({'|'.join(STACKED)})_(\d+)", name)
        inner = stack(value) if isinstance(value, dict) else value
        if match:
            runs.setdefault(match[1], {})[int(match[2])] = inner
        else:
            out[name] = inner
    for name, layers in runs.items():
        out[name] = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *(layers[i] for i in range(len(layers)))
        )
    return out


def stacked_axes(path: tuple[str, ...]) -> int:
    """How many leading axes of the parameter at `path` come from stacking."""
    return sum(part in STACKED for part in path)
