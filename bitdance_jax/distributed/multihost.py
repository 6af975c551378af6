"""Several processes that train or sample together: how they start, communicate, and stop.

Every process runs the same program and takes part in every collective. Process 0 alone prints, and
writes the files that are not checkpoints.
"""

import atexit
import contextlib
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from bitdance_jax.config import HostsConfig
from bitdance_jax.distributed import launcher, rendezvous
from bitdance_jax.distributed.job import Job, join_address
from bitdance_jax.distributed.rendezvous import Connections
from bitdance_jax.distributed.timers import run_after
from bitdance_jax.distributed.watchdog import Watchdog
from bitdance_jax.errors import Interrupted, UserError


JAX_SECONDS = 120
"""How long JAX's own initialization may take."""

_watchdog: Watchdog | None = None


def initialize(config: HostsConfig = HostsConfig()) -> bool:
    """Connects this process to the others of its job. Call it before any other use of JAX.

    On Cloud TPUs, under Slurm's srun and Open MPI's mpirun, JAX finds the other processes.
    Elsewhere `config` gives them, or the environment: JAX_COORDINATOR_ADDRESS (host:port of process
    0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Without any of these the process is alone.
    BITDANCE_SECRET, the same for all processes, keeps strangers who reach that port out of the job.

    Returns:
      Whether there are other processes.

    Raises:
      UserError: the settings are incomplete or differ, or a process cannot be reached.
    """
    global _watchdog
    job = launcher.find_job(config)
    if job is None:
        return False
    connections = rendezvous.join(job)
    _watchdog = Watchdog(connections.sockets, job.process_id)
    with stop_all_on_error():
        _start_jax(job, connections, _watchdog)
    atexit.register(_watchdog.close)  # Runs before JAX's own, which waits for all processes.
    return True


def _start_jax(job: Job, connections: Connections, watchdog: Watchdog) -> None:
    port = connections.coordinator_port
    bind_address = connections.bind_address
    _bypass_proxy(job.host)

    def stop() -> None:
        watchdog.stop(
            f"process {job.process_id} cannot reach JAX's coordinator, port {port} of process 0, "
            f"in {JAX_SECONDS} s; let the hosts connect to each other at any port"
        )

    # JAX would abort with a stack trace; so its own timeout comes later.
    with run_after(JAX_SECONDS, stop):
        try:
            jax.distributed.initialize(
                join_address(job.host, port),
                num_processes=job.num_processes,
                process_id=job.process_id,
                local_device_ids=launcher.local_device_ids(),
                initialization_timeout=2 * JAX_SECONDS,
                # Process 0 may still write a model when the others have finished.
                shutdown_timeout_seconds=3600,
                coordinator_bind_address=bind_address and join_address(bind_address, port),
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"cannot join the other processes: {str(error).splitlines()[0]}"
            ) from error


def _user_error(error: Exception) -> str | None:
    return str(error) if isinstance(error, UserError) else None


@contextlib.contextmanager
def stop_all_on_error(
    one_line: Callable[[Exception], str | None] = _user_error,
) -> Iterator[None]:
    """An exception inside the block ends all processes with one line, so that none waits for ever.

    Does nothing if there is only one process. Interrupted, which all processes raise, passes.

    Args:
      one_line: the line of an exception; None for a bug, whose traceback is printed too.
    """
    try:
        yield
    except Interrupted:
        raise
    except BaseException as error:
        if _watchdog is None:
            raise
        if isinstance(error, Exception):
            line = one_line(error)
            if line is not None:
                _watchdog.stop(line)
            # A collective fails when another process dies. Then the watchdog ends this process,
            # with a better message.
            time.sleep(3)
            traceback.print_exc()
        _watchdog.stop(f"{type(error).__name__}: {error}".removesuffix(": "))


def stop_all(reason: str, *, stacks: bool = False) -> NoReturn:
    """Ends all processes, or the only one, from any thread: see `Watchdog.stop`."""
    (_watchdog or Watchdog({}, 0)).stop(reason, stacks=stacks)


def gather(array: jax.Array) -> np.ndarray:
    """A global array as numpy, complete in every process."""
    return multihost_utils.process_allgather(array, tiled=True)


def all_true(value: bool) -> bool:
    """Whether `value` is true in all processes."""
    return bool(np.all(multihost_utils.process_allgather(np.bool_(value))))


def merged(value: dict[str, Any]) -> dict[str, Any]:
    """The JSON-ready dicts of all processes as one, in which nested dicts are merged too.

    An entry that several processes have must be equal in all of them.
    """
    if jax.process_count() == 1:
        return value
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int64(len(own)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(own)] = own
    rows = multihost_utils.process_allgather(padded)
    result: dict[str, Any] = {}
    for row, length in zip(rows, lengths, strict=True):
        _merge(result, json.loads(row[: int(length)].tobytes()))
    return result


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for name, value in other.items():
        if isinstance(value, dict):
            _merge(into.setdefault(name, {}), value)
        elif into.setdefault(name, value) != value:
            raise ValueError(f"processes have different values of {name}: {into[name]}, {value}")


def on_process_0(action: Callable[[], int | None]) -> int:
    """Runs `action` in process 0 only, and returns its result, 0 for None, in all processes.

    If it fails, `stop_all_on_error` ends all processes.
    """
    result = action() or 0 if jax.process_index() == 0 else 0
    return int(multihost_utils.broadcast_one_to_all(np.int32(result)))


@contextlib.contextmanager
def entered_on_process_0(context: contextlib.AbstractContextManager[object]) -> Iterator[None]:
    """Process 0 alone enters a context for the block; the others wait until it has.

    If it fails, `stop_all_on_error` ends all processes.
    """
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(context)

        on_process_0(enter)
        yield


def _bypass_proxy(host: str) -> None:
    """Lets gRPC connect to the coordinator, a host of the job, without the proxy of http_proxy."""
    if any(f"{scheme}_proxy" in os.environ for scheme in ("grpc", "https", "http")):
        others = os.environ.get("no_grpc_proxy", os.environ.get("no_proxy"))
        os.environ["no_grpc_proxy"] = ",".join(filter(None, (others, host)))
        jax.config.update("jax_check_proxy_envs", False)  # Suppresses a warning about the proxy.
