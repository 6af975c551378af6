"""How the processes of one job find each other, before JAX starts.

Process 0 listens at the coordinator's HOST:PORT for as long as the job runs, and admits one
process of each id (`admission`, `handshake`). JAX's own coordinator ends the whole job when a
second process arrives with a used id; so it listens at another port, which only admitted processes
learn.
"""

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
import sys
import threading
import time
from typing import NamedTuple

from bitdance_jax.distributed import handshake
from bitdance_jax.distributed.admission import Admission
from bitdance_jax.distributed.job import Job
from bitdance_jax.distributed.timers import run_after
from bitdance_jax.errors import UserError


JOIN_SECONDS = 300
"""How long a process waits for the others."""

QUIET_SECONDS = 10
"""After this time a process prints what it is waiting for."""


class Connections(NamedTuple):
    """The connections between the processes of a job.

    Attributes:
      sockets: by process id: process 0 has one to each other process, the others one to process 0.
      coordinator_port: of JAX's coordinator, on the host of process 0.
      bind_address: at which JAX's coordinator listens; None except in process 0.
    """

    sockets: dict[int, socket.socket]
    coordinator_port: int
    bind_address: str | None = None


def join(job: Job) -> Connections:
    """Connects to the other processes of the job. Every process calls it once.

    Raises:
      UserError: a process is missing, the port is in use, or this process may not join.
    """
    secret = handshake.read_secret()
    if job.process_id == 0:
        return _wait_for_others(job, secret)
    return _connect_to_process_0(job, secret)


def _wait_for_others(job: Job, secret: bytes) -> Connections:
    server = _listen(job)
    bind_address = server.getsockname()[0]
    with socket.create_server((bind_address, 0), family=server.family) as free:
        port = free.getsockname()[1]
    admission = Admission(server, job, secret=secret, coordinator_port=port)
    try:
        with run_after(
            QUIET_SECONDS,
            lambda: _print(f"waiting at {job.address} for {_processes(admission.missing)}"),
        ):
            asyncio.run(admission.wait_for_all(JOIN_SECONDS))
    except TimeoutError:
        reason = (
            f"{_processes(admission.missing)} did not connect to process 0 at {job.address} in "
            f"{JOIN_SECONDS} s; check that it runs, and that no firewall is between"
        )
        admission.dismiss(reason)
        server.close()
        raise UserError(reason) from None
    admission.welcome()
    # Later arrivals are refused, with the reason.
    serve = admission.serve()
    threading.Thread(target=asyncio.run, args=(serve,), name="admission", daemon=True).start()
    return Connections(admission.connections, port, bind_address)


def _connect_to_process_0(job: Job, secret: bytes) -> Connections:
    """Tries again until process 0 answers."""
    this = f"process {job.process_id}"
    deadline = time.monotonic() + JOIN_SECONDS
    problem = ""
    with run_after(
        QUIET_SECONDS, lambda: _print(f"{this} waits for the others at {job.address}{problem}")
    ):
        while True:
            try:
                connection, port = handshake.connect(job, secret, wait_seconds=JOIN_SECONDS)
                return Connections({0: connection}, port)
            except OSError as error:
                problem = f" ({error.strerror or error})"
            if time.monotonic() > deadline:
                raise UserError(
                    f"{this} cannot connect to process 0 at {job.address} in {JOIN_SECONDS} s"
                    f"{problem}; check that it runs, and that no firewall is between"
                )
            time.sleep(0.2)


def _listen(job: Job) -> socket.socket:
    """Listens at the coordinator's address if it is one of this host, otherwise at all addresses.

    The coordinator may be a name, or an address that a router translates.
    """
    host = "127.0.0.1" if job.host == "localhost" else job.host
    try:
        # A ValueError: the host is a name, which other hosts may resolve to another address.
        with contextlib.suppress(ValueError):
            family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
            try:
                return socket.create_server((host, job.port), family=family)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", job.port), family=family, dualstack_ipv6=both)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            why = "is in use by another job or another process 0"
        else:
            why = f"cannot be opened ({os.strerror(error.errno or 0)})"
        raise UserError(
            f"port {job.port} of process 0 {why}; give all processes another coordinator HOST:PORT"
        ) from error


def _processes(ids: list[int]) -> str:
    return f"process{'es' if len(ids) > 1 else ''} {', '.join(map(str, ids))}"


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
