"""Devices: the mesh, and how arrays lie on it.

The mesh has three axes. Rows of a batch are split over "data" and "fsdp"; parameters, and whatever has their shape (gradients, optimizer
state, EMA), over "fsdp" and "tensor", by one table of rules (`RULES`); activations inside a layer over "tensor". Models never name
these axes: they say what an activation's axes are (`constrain`), and the tables here say where those go.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

from bitdance_jax.config import MeshConfig
from bitdance_jax.errors import UserError


AnyMesh = Mesh | AbstractMesh

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
BATCH = (DATA, FSDP)
"""The axes that a batch's rows are split over."""

RULES: tuple[tuple[str, P], ...] = (
    # Layers that widen cut their outputs, those that narrow their inputs: between the two, activations are cut and nothing is moved.
    (r"(qkv|w1|ada_ln|final_ada_ln)/kernel", P(FSDP, None, TENSOR)),
    (r"(fc1|cond_embed|q|k|v|gate|up)/kernel", P(FSDP, TENSOR)),
    (r"(out|w2|fc2|down)/kernel", P(TENSOR, FSDP)),
    (r"final_linear/kernel", P(FSDP, None)),
    (r"input_proj/kernel", P(None, FSDP)),
    (r"class_embedding/embedding", P(None, (FSDP, TENSOR))),
    # The width alone: the released vocabulary, 151988, is 4 x 37997.
    (r"embed_tokens/embedding", P(None, (FSDP, TENSOR))),
    (r"lm_head/kernel", P((FSDP, TENSOR), None)),
    (r"position_embedding|query_tokens", P(None, FSDP)),
    # The tokenizer: convolutions [h, w, in, out], and its adaptive norms.
    (r"(conv\w*|nin_shortcut|\w+_(down|up)sample)/kernel", P(None, None, FSDP, TENSOR)),
    (r"(gamma|beta)/kernel", P(None, FSDP)),
    (r"bias|scale", P()),
)
"""What the end of a parameter's path matches -> its axes, counted from the last; layers stacked in front are never cut."""

ACTIVATIONS: dict[str, str | tuple[str, ...]] = {
    "batch": BATCH,
    "heads": TENSOR,
    "hidden": TENSOR,
    "tokens": AXES,
}
"""What an activation's axis is -> the mesh axes that it is split over, "tokens" being rows without anything to say to each other; any
other is whole."""

LARGE = 2**20
"""A parameter of more elements than this must be cut as its rule says; a smaller one may stay whole where its size does not divide."""


def make_mesh(config: MeshConfig = MeshConfig(), devices: list[jax.Device] | None = None) -> Mesh:
    """The devices (default: all of all hosts) as a mesh with the axes AXES.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    given = int(np.prod([size for size in sizes if size != -1]))
    if len(devices) % given or (-1 not in sizes and given != len(devices)):
        layout = " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True))
        raise UserError(
            f"a mesh of {layout} does not divide {len(devices)} devices; change --mesh.data, --mesh.fsdp or --mesh.tensor"
        )
    shape = [len(devices) // given if size == -1 else size for size in sizes]
    axis_types = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)
    except NotImplementedError:  # an axis that is no product of whole axes of the TPUs' torus
        return Mesh(
            mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True),
            AXES,
            axis_types=axis_types,
        )


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """What the compiler of the mesh's devices is told.

    Products of arrays that are cut stay whole, and what they need or give is exchanged before or after. XLA for TPUs would make them rings
    of small products, whose exchanges take several times as long; `python -m bitdance_jax.plan` shows what that costs.
    """
    return (
        {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
        if mesh.devices.flat[0].platform == "tpu"
        else None
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over "data" and "fsdp"."""
    return NamedSharding(mesh, P(BATCH))


def batch_parts(mesh: AnyMesh) -> int:
    """Parts that a batch's rows are split into."""
    return num_parts(mesh, BATCH)


def num_parts(mesh: AnyMesh, axes: str | tuple[str, ...] | None) -> int:
    """Parts that the given axes, one entry of a PartitionSpec, cut something into."""
    return math.prod(mesh.shape[name] for name in _names(axes))


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def check_batch(mesh: AnyMesh, batch_size: int, accumulate: int = 1) -> None:
    """Raises a UserError unless each device gets as many rows of every micro-batch."""
    parts = batch_parts(mesh) * accumulate
    if batch_size % parts:
        each = f"{batch_parts(mesh)} devices (data x fsdp)" + (
            f" and {accumulate} micro-batches" if accumulate > 1 else ""
        )
        raise UserError(
            f"a batch of {batch_size} cannot be split over {each}; make --data.batch-size a multiple of {parts}"
        )


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Where each array of a tree lies: parameters by RULES, arrays outside of any dict (steps, counters) whole on every device.

    Args:
      tree: arrays or shapes: nested dicts of parameters, or states of such (training state, optax state).

    Raises:
      UserError: a parameter that no rule knows, or a large one that an axis does not divide.
    """

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = "/".join(str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey))
        return NamedSharding(mesh, parameter_spec(mesh, name, leaf.shape) if name else P())

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def parameter_spec(mesh: AnyMesh, name: str, shape: tuple[int, ...]) -> P:
    """The axes of the parameter at a path such as "transformer/layers/mlp/w1/kernel"; see `shardings`."""
    rule = next((spec for pattern, spec in RULES if re.search(rf"(^|/)({pattern})$", name)), None)
    if rule is None:
        raise UserError(
            f"no rule says how to cut the parameter {name}; add one to bitdance_jax/distributed/sharding.py"
        )
    axes = [None] * (len(shape) - len(rule)) + list(rule)
    for i, (names, size) in enumerate(zip(axes, shape, strict=True)):
        parts = num_parts(mesh, names)
        if size % parts == 0:
            continue
        if np.prod(shape) > LARGE:
            flags = " x ".join(f"--mesh.{name}" for name in _names(names))
            raise UserError(
                f"{name} {list(shape)} cannot be cut into {parts} parts; make {flags} a divisor of {size}"
            )
        axes[i] = None
    return P(*axes)


def constrain(x: Array, *axes: str | None) -> Array:
    """Tells the compiler where an activation lies; without a mesh, or inside shard_map, nothing.

    Args:
      axes: what each axis of `x` is (ACTIVATIONS), None for one that is not split. The last mesh axes that do not divide it are left out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x

    def cut(axis: str | None, size: int) -> tuple[str, ...] | None:
        names = _names(None if axis is None else ACTIVATIONS[axis])
        while size % num_parts(mesh, names):
            names = names[:-1]
        return names or None

    return jax.lax.with_sharding_constraint(x, P(*map(cut, axes, x.shape)))


class _Gathering(NamedTuple):
    """How a parameter is gathered.

    Attributes:
      places: the axes that it is cut over before and after; None: it stays where it is.
      dtype: in which it travels.
      result: in which it arrives, and in which its gradient is summed.
      own: the parameter's.
    """

    places: tuple[P, P] | None
    dtype: jnp.dtype
    result: jnp.dtype
    own: jnp.dtype


def gathered(kernel: Array, name: str, dtype: DTypeLike, sums: DTypeLike | None = None) -> Array:
    """A parameter in the compute type, whole but for the axis "tensor": first converted, then gathered over "fsdp".

    The gradient goes the other way: each device gets its own part of the sum. Without a mesh only the type changes.

    Args:
      sums: the type of the gradient and of its sum over devices, hence of the result, whose values are those of the compute
        type all the same; None: the compute type.
    """
    mesh = jax.sharding.get_abstract_mesh()
    dtype, result = jnp.dtype(dtype), jnp.dtype(sums or dtype)
    if mesh.empty or mesh.manual_axes or mesh.shape[FSDP] == 1:
        places = None
        if result == dtype:
            return kernel.astype(dtype)
    else:
        cut = parameter_spec(mesh, name, kernel.shape)
        places = (
            cut,
            P(*(tuple(axis for axis in _names(axes) if axis != FSDP) or None for axes in cut)),
        )
    return _gather(kernel, _Gathering(places, dtype, result, kernel.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(kernel: Array, how: _Gathering) -> Array:
    kernel = kernel.astype(how.dtype)
    for place in how.places or ():
        kernel = jax.lax.with_sharding_constraint(kernel, place)
    return kernel.astype(how.result)


def _gather_forward(kernel: Array, how: _Gathering) -> tuple[Array, None]:
    return _gather(kernel, how), None


def _gather_backward(how: _Gathering, _: None, gradient: Array) -> tuple[Array]:
    if how.places:
        gradient = jax.lax.with_sharding_constraint(gradient, how.places[0])
    return (gradient.astype(how.own),)


_gather.defvjp(_gather_forward, _gather_backward)


def split_rows(tree: Any, parts: int) -> Any:
    """Every array of a batch [B, ...] as [parts, B / parts, ...]; part i has the rows i, i + parts, ...: none leaves its device."""

    def split(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(split, tree)


def map_rows(function: Callable[[Array], Array], x: Array, rows: int) -> Array:
    """`function` of a batch, so many rows a device at a time, to bound the memory that it takes."""
    mesh = jax.sharding.get_abstract_mesh()
    here = len(x) // (1 if mesh.empty else batch_parts(mesh))
    parts = next(
        parts for parts in range(1, here + 1) if here % parts == 0 and here // parts <= rows
    )
    if parts == 1:
        return function(x)
    y = jnp.moveaxis(jax.lax.map(function, split_rows(x, parts)), 0, 1)
    return constrain(y.reshape(-1, *y.shape[2:]), "batch", *[None] * (y.ndim - 2))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a batch lie on this process's devices, int64, sorted. Processes that share a row have it both."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[place] for place in places]))


def put(mesh: Mesh, params: Any) -> Any:
    """Parameters that every process has whole, as numpy arrays, laid out as `shardings` says."""
    return jax.tree.map(
        lambda x, place: jax.make_array_from_callback(x.shape, place, lambda i: x[i]),
        params,
        shardings(mesh, params),
    )


def put_batch(mesh: Mesh, batch: Any, batch_size: int) -> Any:
    """This process's rows (`local_rows`) of every array of a batch, as arrays of `batch_size` rows over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:])),
        batch,
    )


def replicate(mesh: Mesh, tree: Any) -> Any:
    """The arrays of a tree on every device. On several hosts each must give the same ones."""
    return jax.device_put(tree, NamedSharding(mesh, P()))
