"""What a traced model says about sharding: constraints on activations, gathered parameters, and
batches split into parts that need no communication. Without a mesh all of them do nothing."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

from bitdance_jax.distributed.mesh import (
    AXES,
    BATCH,
    FSDP,
    TENSOR,
    AnyMesh,
    axis_names,
    batch_parts,
    num_parts,
)
from bitdance_jax.distributed.sharding import part_spec


ACTIVATIONS: dict[str, str | tuple[str, ...]] = {
    "batch": BATCH,
    "heads": TENSOR,
    "hidden": TENSOR,
    "tokens": AXES,
}
"""The mesh axes of an activation's axis, by its name. "tokens" are rows that are computed
independently of each other. Any other axis is not split."""


def constrain(x: Array, *axes: str | None) -> Array:
    """Tells the compiler how an activation is sharded; inside shard_map, does nothing.

    Args:
      x: the activation.
      axes: for each axis of `x` its name in ACTIVATIONS; None: not split. Mesh axes that do not
        divide it are dropped, the last first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x

    entries = (_entry(mesh, axis, size) for axis, size in zip(axes, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, P(*entries))


def _entry(mesh: AnyMesh, axis: str | None, size: int) -> tuple[str, ...] | None:
    """The mesh axes of an activation's axis, without those that do not divide it."""
    names = axis_names(None if axis is None else ACTIVATIONS[axis])
    while size % num_parts(mesh, names):
        names = names[:-1]
    return names or None


Axes = tuple[str | None, ...]
"""For each axis of an activation its name in ACTIVATIONS; None: not split."""


def map_shards(
    function: Callable[..., tuple[Array, ...]],
    sizes: dict[str, int],
    inputs: Sequence[Axes],
    outputs: Sequence[Axes],
    *arrays: Array,
) -> tuple[Array, ...]:
    """`function` on each device's parts of arrays: for kernels, which the compiler cannot split.

    Args:
      function: of parts, without communication.
      sizes: how many rows, heads, ... there are, by name. Mesh axes that do not divide them are not
        used.
      inputs, outputs: of every array that the function takes and returns.
      arrays: what it takes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return function(*arrays)

    def specs(of_all: Sequence[Axes]) -> tuple[P, ...]:
        return tuple(
            P(*(None if name is None else _entry(mesh, name, sizes[name]) for name in axes))
            for axes in of_all
        )

    return jax.shard_map(
        function, in_specs=specs(inputs), out_specs=specs(outputs), check_vma=False
    )(*arrays)


class _Gathering(NamedTuple):
    """How a parameter is gathered.

    Attributes:
      specs: before and after; None: the sharding does not change.
      dtype: during communication.
      result: of the gathered array and of its gradient.
      original: the parameter's.
    """

    specs: tuple[P, P] | None
    dtype: jnp.dtype
    result: jnp.dtype
    original: jnp.dtype


def gathered(
    kernel: Array,
    name: str,
    dtype: DTypeLike,
    *,
    sums: DTypeLike | None = None,
    of: tuple[int, ...] | None = None,
) -> Array:
    """A parameter in the compute type, gathered over "fsdp" and still sharded over "tensor".

    It is converted before it is gathered. Its gradient is reduced and scattered: each device gets
    its own part of the sum. Without a mesh only the type changes.

    Args:
      kernel: the parameter.
      name: its path.
      dtype: the compute type.
      sums: dtype of the gradient and of its sum over devices, hence of the result (whose values are
        still rounded to the compute type); None: the compute type.
      of: shape of the parameter, if the kernel is a part of it (`sharding.part_spec`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    dtype = jnp.dtype(dtype)
    result = jnp.dtype(sums or dtype)
    if mesh.empty or mesh.manual_axes or mesh.shape[FSDP] == 1:
        if result == dtype:
            return kernel.astype(dtype)
        specs = None
    else:
        spec = part_spec(mesh, name, of or kernel.shape, kernel.shape)
        specs = spec, P(*map(_without_fsdp, spec))
    return _gather(kernel, _Gathering(specs, dtype, result, kernel.dtype))


def _without_fsdp(axes: Any) -> tuple[str, ...] | None:
    return tuple(axis for axis in axis_names(axes) if axis != FSDP) or None


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(kernel: Array, how: _Gathering) -> Array:
    kernel = kernel.astype(how.dtype)
    for spec in how.specs or ():
        kernel = jax.lax.with_sharding_constraint(kernel, spec)
    return kernel.astype(how.result)


def _gather_forward(kernel: Array, how: _Gathering) -> tuple[Array, None]:
    return _gather(kernel, how), None


def _gather_backward(how: _Gathering, _: None, gradient: Array) -> tuple[Array]:
    if how.specs:
        gradient = jax.lax.with_sharding_constraint(gradient, how.specs[0])
    return (gradient.astype(how.original),)


_gather.defvjp(_gather_forward, _gather_backward)


def split_rows(tree: Any, parts: int) -> Any:
    """Every array of a batch [B, ...] as [parts, B / parts, ...].

    Part i has the rows i, i + parts, ..., so no row changes its device.
    """

    def split(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(split, tree)


def rows_per_device(rows: int) -> int:
    """How many rows of a batch of so many are on a device."""
    mesh = jax.sharding.get_abstract_mesh()
    return rows if mesh.empty or mesh.manual_axes else max(1, rows // batch_parts(mesh))


def map_rows(function: Callable[[Array], Array], x: Array, rows: int) -> Array:
    """`function` of a batch, at most `rows` rows per device at a time, to bound its memory."""
    rows_here = rows_per_device(len(x))
    parts = next(
        parts
        for parts in range(1, rows_here + 1)
        if rows_here % parts == 0 and rows_here // parts <= rows
    )
    if parts == 1:
        return function(x)
    y = jnp.moveaxis(jax.lax.map(function, split_rows(x, parts)), 0, 1)
    return constrain(y.reshape(-1, *y.shape[2:]), "batch", *[None] * (y.ndim - 2))
