"""The device mesh, and how the rows of a batch are distributed over it.

The mesh has three axes. Batch rows are split over "data" and "fsdp", parameters over "fsdp" and
"tensor" (`distributed.sharding`), activations inside a layer over "tensor"
(`distributed.constraints`).
"""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bitdance_jax.config import MeshConfig
from bitdance_jax.errors import ConfigError


AnyMesh = Mesh | AbstractMesh

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
BATCH = (DATA, FSDP)
"""The mesh axes that batch rows are split over."""


def make_mesh(config: MeshConfig = MeshConfig(), devices: list[jax.Device] | None = None) -> Mesh:
    """The devices (default: all devices of all hosts) as a mesh with the axes AXES.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    given = math.prod(size for size in sizes if size != -1)
    if len(devices) % given or (-1 not in sizes and given != len(devices)):
        layout = " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True))
        raise ConfigError(
            f"a mesh of {layout} does not divide {len(devices)} devices; "
            "change mesh.data, mesh.fsdp or mesh.tensor",
            field="mesh",
        )
    shape = [len(devices) // given if size == -1 else size for size in sizes]
    axis_types = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)
    except NotImplementedError:  # A mesh axis is not a product of axes of the TPUs' torus.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=axis_types)


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """XLA options for the mesh's devices.

    On TPUs they keep XLA from splitting a product of sharded arrays into a ring of small products,
    whose communication takes several times as long as one all-gather; `bitdance plan`
    shows the cost.
    """
    if mesh.devices.flat[0].platform != "tpu":
        return None
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over "data" and "fsdp"."""
    return NamedSharding(mesh, P(BATCH))


def batch_parts(mesh: AnyMesh) -> int:
    """Number of parts that batch rows are split into."""
    return num_parts(mesh, BATCH)


def num_parts(mesh: AnyMesh, axes: str | tuple[str, ...] | None) -> int:
    """Number of parts that one entry of a PartitionSpec splits an axis into."""
    return math.prod(mesh.shape[name] for name in axis_names(axes))


def axis_names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return (axes,) if isinstance(axes, str) else axes or ()


def check_batch(mesh: AnyMesh, batch_size: int, accumulate: int = 1) -> None:
    """Raises a ConfigError unless each device gets equally many rows of every micro-batch."""
    parts = batch_parts(mesh) * accumulate
    if batch_size % parts:
        micro = f" and {accumulate} micro-batches" if accumulate > 1 else ""
        raise ConfigError(
            f"a batch of {batch_size} cannot be split over {batch_parts(mesh)} devices "
            f"(data x fsdp){micro}; make data.batch_size a multiple of {parts}",
            field="data.batch_size",
        )


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The batch rows on this process's devices, int64, sorted.

    Processes that share a row both have it.
    """
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in slices]))


def put_batch(mesh: Mesh, batch: Any, batch_size: int) -> Any:
    """Arrays of `batch_size` rows over the mesh, from this process's rows (`local_rows`)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:])),
        batch,
    )
