"""Several processes that train or sample together: how they find each other, agree, and stop.

Every process runs the same program and takes part in every collective. Process 0 alone prints, and writes what is not a checkpoint.
"""

import atexit
import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from bitdance_jax.config import HostsConfig
from bitdance_jax.distributed import launcher, rendezvous, watchdog
from bitdance_jax.errors import Interrupted, UserError


JAX_SECONDS = 120
_watchdog: watchdog.Watchdog | None = None


def initialize(config: HostsConfig = HostsConfig()) -> bool:
    """Joins this process to the others of its job, before anything else is asked of JAX; whether there are any.

    On Cloud TPUs, under Slurm's srun and Open MPI's mpirun, JAX finds the others by itself. Elsewhere `config` names them, or the
    environment: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Else there are no others.
    Where not everybody who reaches that port may join, BITDANCE_SECRET is a secret that all processes share.

    Raises:
      UserError: the others cannot be reached, or what is said of them is incomplete or another thing than they were told.
    """
    global _watchdog
    job = launcher.job(config)
    if job is None:
        return False
    meeting = rendezvous.join(job)
    _watchdog = watchdog.Watchdog(meeting.connections, job.number)
    with stop_all_on_error():
        _start_jax(job, meeting)
    atexit.register(_watchdog.close)  # Runs before JAX's own, which waits for all processes.
    return True


def _start_jax(job: rendezvous.Job, meeting: rendezvous.Meeting) -> None:
    _bypass_proxy(job.host)
    with _time_limit(
        f"process {job.number} cannot reach JAX's coordinator, port {meeting.jax_port} of process 0"
    ):
        try:
            jax.distributed.initialize(
                rendezvous.address(job.host, meeting.jax_port),
                num_processes=job.processes,
                process_id=job.number,
                local_device_ids=launcher.local_device_ids(),
                initialization_timeout=2 * JAX_SECONDS,  # JAX would abort; `_time_limit` is first.
                shutdown_timeout_seconds=3600,  # Process 0 may still be writing a model when the others are done.
                coordinator_bind_address=meeting.bind_address
                and rendezvous.address(meeting.bind_address, meeting.jax_port),
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"cannot join the other processes: {str(error).splitlines()[0]}"
            ) from error


@contextlib.contextmanager
def stop_all_on_error() -> Iterator[None]:
    """Whatever goes wrong inside stops all processes with one line: none waits for ever. Does nothing where there is one process.

    What all of them raise alike, an Interrupted, passes.
    """
    try:
        yield
    except Interrupted:
        raise
    except BaseException as error:
        if _watchdog is None:
            raise
        if isinstance(error, UserError):
            _watchdog.stop(str(error))
        if isinstance(error, Exception):
            time.sleep(
                3
            )  # A collective fails when another process dies. Then the watch ends this one, and says it better.
            traceback.print_exc()
        _watchdog.stop(f"{type(error).__name__}: {error}".removesuffix(": "))


def gather(array: jax.Array) -> np.ndarray:
    """A global array as numpy, whole on every process."""
    return multihost_utils.process_allgather(array, tiled=True)


def all_true(fine: bool) -> bool:
    """Whether all processes say so."""
    return bool(np.all(multihost_utils.process_allgather(np.bool_(fine))))


def on_process_0(action: Callable[[], int | None]) -> int:
    """What `action` returns on process 0, where alone it is run; 0 for None. If it fails there, `stop_all_on_error` stops all processes."""
    result = action() or 0 if jax.process_index() == 0 else 0
    return int(multihost_utils.broadcast_one_to_all(np.int32(result)))


@contextlib.contextmanager
def entered_on_process_0(context: contextlib.AbstractContextManager[object]) -> Iterator[None]:
    """Process 0 alone enters a context for the block; the others go on once it has. If it fails, as `on_process_0`."""
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(context)

        on_process_0(enter)
        yield


def _bypass_proxy(host: str) -> None:
    """The coordinator is one of the job's own hosts: behind http_proxy gRPC would ask the proxy for it, and wait for ever."""
    if any(f"{scheme}_proxy" in os.environ for scheme in ("grpc", "https", "http")):
        others = os.environ.get("no_grpc_proxy", os.environ.get("no_proxy"))
        os.environ["no_grpc_proxy"] = ",".join(filter(None, (others, host)))
        jax.config.update("jax_check_proxy_envs", False)  # A warning of just that.


@contextlib.contextmanager
def _time_limit(complaint: str) -> Iterator[None]:
    """Ends all processes with one line if what is inside takes too long: JAX would abort with a stack trace."""

    def give_up() -> None:
        assert _watchdog is not None
        _watchdog.stop(
            f"{complaint} in {JAX_SECONDS} s; let the hosts talk to each other at any port"
        )

    timer = threading.Timer(JAX_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
