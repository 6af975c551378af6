"""Ends all processes of a job, with one line that says why, when any of them fails or dies.

A collective waits for ever for a process that is gone; JAX's own watchdog takes minutes and then
aborts with a stack trace. So each process has a connection to process 0 and a thread that reads it:
a line is the reason to stop, and an end of the stream without a goodbye is a death.
"""

import contextlib
import faulthandler
import os
import selectors
import socket
import sys
import threading
import time
from typing import BinaryIO, NoReturn

from bitdance_jax.distributed.timers import run_after


GONE = (
    "process {} is gone (killed, or its host is down); "
    "start all processes again: the same command resumes from what is saved"
)
GOODBYE = b"\n"
STACKS = "stacks: "
"""Starts a reason for which every process prints its stacks."""
PRINT_SECONDS = 30
EXIT_CODE = 2


class Watchdog:
    """Watches the connections of this process, from the moment it is made."""

    def __init__(self, sockets: dict[int, socket.socket], process_id: int) -> None:
        """`sockets`: as in `rendezvous.Connections`; `process_id`: of this process."""
        self._sockets = sockets
        self._process_id = process_id
        # Taken by the thread that ends this process, and never released.
        self._ending = threading.Lock()
        for connection in sockets.values():
            _enable_keepalive(connection)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self, reason: str, *, stacks: bool = False) -> NoReturn:
        """Ends all processes: each prints "error: REASON" and exits with status 2.

        Args:
          reason: one line.
          stacks: each prints the stacks of all its threads before.
        """
        mark = STACKS if stacks else ""
        self._end(reason, sent=f"{mark}process {self._process_id}: {reason}", stacks=stacks)

    def close(self) -> None:
        """Says goodbye: from now on this process and the others may exit."""
        if self._ending.acquire(blocking=False):
            self._send(GOODBYE)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process_id, connection in self._sockets.items():
                data = (process_id, connection.makefile("rb"))
                selector.register(connection, selectors.EVENT_READ, data)
            while selector.get_map():
                for key, _ in selector.select():
                    process_id, stream = key.data
                    line = _read_line(stream)
                    if line == GOODBYE:
                        selector.unregister(key.fileobj)
                        continue
                    sent = line.decode(errors="replace").strip() or GONE.format(process_id)
                    reason = sent.removeprefix(STACKS)
                    self._end(reason, sent=sent, stacks=reason != sent)

    def _end(self, printed: str, *, sent: str, stacks: bool) -> NoReturn:
        """Prints a reason here, sends a reason to the others, and exits."""
        # Printing blocks for ever where nobody reads the output.
        with self._ending, run_after(PRINT_SECONDS, lambda: os._exit(EXIT_CODE)):
            if stacks:
                os.write(2, b"\n")
                faulthandler.dump_traceback(2)
            sys.stdout.flush()
            # os.write, because the main thread may hold sys.stderr's lock. The first newline ends
            # the line of a progress bar.
            os.write(2, f"\nerror: {printed}\n".encode())
            self._send(" ".join(sent.split()).encode() + b"\n")
            if self._process_id == 0:
                self._wait_for_others()
            # The main thread may wait in a collective, and JAX's exit handler for all processes.
            os._exit(EXIT_CODE)

    def _send(self, line: bytes) -> None:
        for connection in self._sockets.values():
            with contextlib.suppress(OSError):
                connection.sendall(line)

    def _wait_for_others(self, seconds: int = 5) -> None:
        """Until the others have exited.

        JAX's coordinator runs in process 0: without it the others abort before they print why.
        """
        deadline = time.monotonic() + seconds
        for connection in self._sockets.values():
            with contextlib.suppress(OSError):
                connection.settimeout(max(deadline - time.monotonic(), 0.01))
                while connection.recv(4096):
                    pass


def _enable_keepalive(connection: socket.socket) -> None:
    """Detects a host without power or network, which closes no connection, after 40 s."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _read_line(stream: BinaryIO) -> bytes:
    try:
        return stream.readline()
    except OSError:
        return b""
