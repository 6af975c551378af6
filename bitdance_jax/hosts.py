"""Several processes that train or sample together: how they find each other, agree, and stop.

Every process runs the same program and takes part in every collective. Process 0 alone prints, and writes what is not a checkpoint.
"""

import atexit
import contextlib
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from bitdance_jax import peers
from bitdance_jax.config import HostsConfig
from bitdance_jax.errors import Interrupted, UserError


MEETING_SECONDS = 300
_peers: peers.Peers | None = None


def start(config: HostsConfig = HostsConfig()) -> bool:
    """Joins this process to the others of its job, before anything else is asked of JAX; whether there are any.

    On Cloud TPUs, under Slurm's srun and Open MPI's mpirun, JAX finds the others by itself. Elsewhere `config` names them, or the
    environment: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Else there are no others.

    Raises:
      UserError: the others cannot be reached, or what is said of them is incomplete.
    """
    global _peers
    coordinator, count, number = _named(config)
    if count == 1 or (coordinator is None and count is None and os.environ.get("SLURM_NTASKS") == "1"):
        return False
    with _meeting(coordinator, number):
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes=count,
                process_id=number,
                local_device_ids=_local_device_ids(),
                initialization_timeout=2 * MEETING_SECONDS,  # JAX would abort; `_meeting` is first.
                shutdown_timeout_seconds=3600,  # Process 0 may still be writing a model when the others are done.
            )
        except (ValueError, RuntimeError) as error:
            if coordinator is None and "coordinator_address should be defined" in str(error):
                return False  # JAX knows of no cluster here.
            raise UserError(f"cannot join the other processes: {str(error).splitlines()[0]}") from error
    if jax.process_count() == 1:
        return False
    _peers = peers.connect()
    atexit.register(_peers.close)  # Runs before JAX's own, which waits for all processes.
    return True


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Whatever goes wrong inside stops all processes with one line: none waits for ever. Does nothing where there is one process.

    What all of them raise alike, an Interrupted, passes.
    """
    try:
        yield
    except Interrupted:
        raise
    except BaseException as error:
        if _peers is None:
            raise
        if isinstance(error, UserError):
            _peers.stop(str(error))
        if isinstance(error, Exception):
            time.sleep(3)  # A collective fails when another process dies. Then the watch ends this one, and says it better.
            traceback.print_exc()
        _peers.stop(f"{type(error).__name__}: {error}".removesuffix(": "))


def gather(array: jax.Array) -> np.ndarray:
    """A global array as numpy, whole on every process."""
    return multihost_utils.process_allgather(array, tiled=True)


def all_agree(fine: bool) -> bool:
    """Whether all processes say so."""
    return bool(np.all(multihost_utils.process_allgather(np.bool_(fine))))


def on_first(action: Callable[[], int | None]) -> int:
    """What `action` returns on process 0, where alone it is run; 0 for None. If it fails there, `together` stops all processes."""
    result = action() or 0 if jax.process_index() == 0 else 0
    return int(multihost_utils.broadcast_one_to_all(np.int32(result)))


def _named(config: HostsConfig) -> tuple[str | None, int | None, int | None]:
    """Coordinator, number of processes and this one's number, as far as flags, environment or Open MPI name them."""
    environment = os.environ.get
    count = config.num_processes or _number("JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE")
    number = config.process_id if config.process_id is not None else _number("JAX_PROCESS_ID", "OMPI_COMM_WORLD_RANK")
    coordinator = config.coordinator or environment("JAX_COORDINATOR_ADDRESS")
    if coordinator is None and count not in (None, 1) and "OMPI_MCA_orte_hnp_uri" not in os.environ:
        raise UserError(f"there are {count} processes, and nothing says where process 0 is; set JAX_COORDINATOR_ADDRESS=HOST:PORT on each")
    return coordinator, count, number


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


@contextlib.contextmanager
def _meeting(coordinator: str | None, number: int | None) -> Iterator[None]:
    """Ends this process with one line if the others do not come: JAX would abort with a stack trace."""
    where = coordinator or "process 0"
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not (host and port.isdecimal()):
            raise UserError(f"the coordinator must be HOST:PORT of process 0, got {coordinator}")
        try:
            socket.getaddrinfo(host.strip("[]"), int(port))
        except OSError as error:
            raise UserError(f"the coordinator's host {host} is not known here ({error.strerror or error})") from error

    def give_up() -> None:
        who = "this process" if number is None else f"process {number}"
        os.write(
            2, f"error: {who} has waited {MEETING_SECONDS} s at {where} for all the others; are they started, and not shut off?\n".encode()
        )
        os._exit(peers.EXIT_CODE)

    timer = threading.Timer(MEETING_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _local_device_ids() -> list[int] | None:
    """Which of its host's GPUs this process takes: [] for all that it sees, None for JAX's choice.

    Under Slurm and Open MPI that is one, the one with the process's number on its host: right only where each process sees all of them.
    """
    environment = os.environ
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    tasks, nodes = environment.get("SLURM_NTASKS"), environment.get("SLURM_STEP_NUM_NODES")
    one_a_host = (tasks is not None and tasks == nodes) or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    given_its_own = "SLURM_GPUS_PER_TASK" in environment or (visible is not None and "," not in visible)
    return [] if one_a_host or given_its_own else None
