"""Finds the job of this process from flags, environment variables and launchers."""

import os
import socket

from bitdance_jax.config import HostsConfig
from bitdance_jax.distributed.job import Job
from bitdance_jax.errors import ConfigError, UserError


VARIABLES = "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID"

DETECTION_SECONDS = 300
"""JAX may wait this long for the host of process 0 to be known."""


def find_job(config: HostsConfig) -> Job | None:
    """The job of this process, None if it is alone. `multihost.initialize` lists the sources.

    Raises:
      UserError: the settings are incomplete or wrong.
    """
    count = config.num_processes or _read_integer("JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE")
    process_id = config.process_id
    if process_id is None:
        process_id = _read_integer("JAX_PROCESS_ID", "OMPI_COMM_WORLD_RANK")
    coordinator = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if count != 1 and None in (coordinator, count, process_id):
        coordinator, count, process_id = _detect(coordinator, count, process_id)
    if count == 1 or coordinator is count is None:
        return None
    if coordinator is None:
        raise UserError(
            f"there are {count} processes, and the address of process 0 is unknown; "
            "set JAX_COORDINATOR_ADDRESS=HOST:PORT for each"
        )
    if count is None or process_id is None:
        raise UserError(
            f"process 0 is at {coordinator}, and the number of processes or the id of this one is "
            f"unknown; set {VARIABLES} for each"
        )
    if not 0 <= process_id < count:
        raise ConfigError(
            f"the id of one of {count} processes must be from 0 to {count - 1}, got {process_id}",
            "hosts.process_id",
        )
    return Job(*_parse_address(coordinator), count, process_id)


def local_device_ids() -> list[int] | None:
    """The GPUs of its host that this process uses: [] for all that it sees, None for JAX's choice.

    Under Slurm and Open MPI JAX chooses one GPU, by the process's number on its host. That is right
    only where each process sees all GPUs.
    """
    environment = os.environ
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    tasks = environment.get("SLURM_NTASKS")
    nodes = environment.get("SLURM_STEP_NUM_NODES")
    one_under_slurm = tasks is not None and tasks == nodes
    one_under_mpi = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    sees_one = visible is not None and "," not in visible
    sees_its_own = "SLURM_GPUS_PER_TASK" in environment or sees_one
    return [] if one_under_slurm or one_under_mpi or sees_its_own else None


def _detect(
    coordinator: str | None, count: int | None, process_id: int | None
) -> tuple[str | None, int | None, int | None]:
    """Completes what is None, as JAX does on Cloud TPUs, under Slurm, Open MPI and Kubernetes."""
    try:
        # Private: no public function tells before `jax.distributed.initialize` has begun.
        # tests/distributed/test_launcher.py fails if it changes.
        from jax._src.clusters import ClusterEnv

        found = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, count, process_id, [], None, DETECTION_SECONDS
        )
        return found[0], found[1], found[2]
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(
            f"this version of JAX cannot find the other processes ({error}); "
            f"set {VARIABLES} for each"
        ) from error
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"cannot find the other processes ({str(error).splitlines()[0]}); "
            f"set {VARIABLES} for each"
        ) from error


def _read_integer(*names: str) -> int | None:
    """The first of these environment variables that is set; None if none is."""
    for name in names:
        value = os.environ.get(name)
        if value is not None:
            try:
                return int(value)
            except ValueError:
                raise ConfigError(f"{name} must be an integer, got {value!r}", name) from None
    return None


def _parse_address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    host = host.strip("[]")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(
            f"the coordinator must be HOST:PORT of process 0, got {coordinator}",
            "hosts.coordinator",
        )
    try:
        socket.getaddrinfo(host, int(port))
    except OSError as error:
        raise ConfigError(
            f"the coordinator's host {host} cannot be resolved ({error.strerror or error}); "
            "give a host that all processes know",
            "hosts.coordinator",
        ) from error
    return host, int(port)
