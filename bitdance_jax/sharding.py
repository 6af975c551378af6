"""Devices and hosts: the mesh, how arrays lie on it, and what only one host may do.

The mesh has one axis, "data", over all devices of all hosts: batches are split over it, weights are on every device.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bitdance_jax.errors import UserError


DATA = "data"


def start_multi_host() -> None:
    """Joins this process to those on the other hosts; before anything else is asked of JAX.

    Cloud TPUs, Slurm and Open MPI tell JAX all it needs. Elsewhere each process finds it in its environment: JAX_COORDINATOR_ADDRESS
    (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      UserError: neither is so, or the other processes cannot be reached.
    """
    try:
        count, number = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(num_processes=int(count) if count else None, process_id=int(number) if number else None)
    except (ValueError, RuntimeError) as error:
        wanted = "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        raise UserError(f"cannot join the other hosts ({str(error).splitlines()[0]}); is {wanted} set on each?") from error


def data_mesh() -> Mesh:
    """All devices of all hosts in one axis, "data"."""
    return jax.make_mesh((jax.device_count(),), (DATA,), axis_types=(AxisType.Auto,))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """The arrays of a tree on every device. On several hosts each must give the same ones."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def shard_batch(mesh: Mesh, batch: Any, *, whole: bool = False) -> Any:
    """A tree of numpy arrays as JAX arrays whose rows are split over the mesh.

    Args:
      mesh: `data_mesh`.
      batch: rows of this host alone, which become a part of the global batch; every host gives as many.
      whole: every host gives the whole global batch instead; each takes its own rows.

    Raises:
      UserError: the rows cannot be split evenly.
    """
    sharding = NamedSharding(mesh, P(DATA))
    devices = mesh.size if whole else len(mesh.local_devices)

    def shard(array: np.ndarray) -> jax.Array:
        if len(array) % devices:
            raise UserError(f"a batch of {len(array)} cannot be split over {devices} devices; make it a multiple of {devices}")
        return jax.make_array_from_process_local_data(sharding, array, array.shape if whole else None)

    return jax.tree.map(shard, batch)


def gather(array: jax.Array) -> np.ndarray:
    """A global array as numpy, whole on every host."""
    return multihost_utils.process_allgather(array, tiled=True)


def on_first_host(action: Callable[[], int]) -> int:
    """What `action` returns on process 0, where alone it is run: a number >= 0. If it fails, all processes fail and none waits for ever."""
    result, failure = -1, None
    if jax.process_index() == 0:
        try:
            result = action()
        except UserError as error:
            failure = error
    result = int(multihost_utils.broadcast_one_to_all(np.int32(result)))
    if failure is not None:
        raise failure
    if result < 0:
        raise UserError("process 0 stopped; its message says why")
    return result
