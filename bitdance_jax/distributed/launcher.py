"""What flags, environment and launchers say of a job: where process 0 is, how many processes there are, and which one this is."""

import os
import socket

from bitdance_jax.config import HostsConfig
from bitdance_jax.distributed.rendezvous import MEETING_SECONDS, Job
from bitdance_jax.errors import UserError


VARIABLES = "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID"


def job(config: HostsConfig) -> Job | None:
    """The job of this process, None if it is alone: see `multihost.initialize`.

    Raises:
      UserError: what is said is incomplete or wrong.
    """
    count = config.num_processes or _number("JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE")
    number = (
        config.process_id
        if config.process_id is not None
        else _number("JAX_PROCESS_ID", "OMPI_COMM_WORLD_RANK")
    )
    coordinator = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if count != 1 and None in (coordinator, count, number):
        coordinator, count, number = _ask_jax(coordinator, count, number)
    if count == 1 or coordinator is count is None:
        return None
    if coordinator is None:
        raise UserError(
            f"there are {count} processes, and nothing says where process 0 is; set JAX_COORDINATOR_ADDRESS=HOST:PORT on each"
        )
    if count is None or number is None:
        raise UserError(
            f"process 0 is at {coordinator}, and nothing says which process this is of how many; set {VARIABLES} on each"
        )
    if not 0 <= number < count:
        raise UserError(
            f"a process's number must be from 0 to {count - 1} where there are {count} processes, got {number}"
        )
    return Job(*_host_and_port(coordinator), count, number)


def _ask_jax(
    coordinator: str | None, count: int | None, number: int | None
) -> tuple[str | None, int | None, int | None]:
    """What is missing, as JAX finds it on Cloud TPUs, under Slurm, Open MPI and Kubernetes."""
    try:
        # Nothing public tells it before `jax.distributed.initialize` has begun. tests/test_launcher.py guards it.
        from jax._src.clusters import ClusterEnv

        found = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, count, number, [], None, MEETING_SECONDS
        )
        return found[0], found[1], found[2]
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(
            f"this JAX does not say who the other processes are ({error}); set {VARIABLES} on each"
        ) from error
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"cannot find the other processes ({str(error).splitlines()[0]}); set {VARIABLES} on each"
        ) from error


def _number(*names: str) -> int | None:
    """The first environment variable of these that is there."""
    for name in names:
        value = os.environ.get(name)
        if value is not None:
            try:
                return int(value)
            except ValueError:
                raise UserError(f"{name} must be a whole number, got {value!r}") from None
    return None


def _host_and_port(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    host = host.strip("[]")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"the coordinator must be HOST:PORT of process 0, got {coordinator}")
    try:
        socket.getaddrinfo(host, int(port))
    except OSError as error:
        raise UserError(
            f"the coordinator's host {host} is not known here ({error.strerror or error})"
        ) from error
    return host, int(port)


def local_device_ids() -> list[int] | None:
    """Which of its host's GPUs this process takes: [] for all that it sees, None for JAX's choice.

    Under Slurm and Open MPI that is one, the one with the process's number on its host: right only where each process sees all of them.
    """
    environment = os.environ
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    tasks, nodes = environment.get("SLURM_NTASKS"), environment.get("SLURM_STEP_NUM_NODES")
    one_a_host = (tasks is not None and tasks == nodes) or environment.get(
        "OMPI_COMM_WORLD_LOCAL_SIZE"
    ) == "1"
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    given_its_own = "SLURM_GPUS_PER_TASK" in environment or (
        visible is not None and "," not in visible
    )
    return [] if one_a_host or given_its_own else None
