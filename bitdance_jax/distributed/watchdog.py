"""How the processes of one job fall together: a failure or a death anywhere ends all of them at once, with one line that says why.

A collective waits for ever for a process that is gone, and JAX's own watch takes minutes and then aborts with a stack trace. So each
process holds a connection to process 0 and a thread that reads it: a line is the reason to stop, an end without a farewell is a death.
"""

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from typing import BinaryIO, NoReturn


GONE = "process {} is gone (killed, or its host is down); start all of them again: the same command goes on from what is saved"
FAREWELL = b"\n"
EXIT_CODE = 2


class Watchdog:
    """This process's connections to the others: process 0 has one to each, the others have one to process 0."""

    def __init__(self, connections: dict[int, socket.socket], number: int) -> None:
        """`connections`: by the process at the other end; `number`: this one's. The watch starts at once."""
        self._connections, self._number = connections, number
        self._ending = threading.Lock()  # Taken by whoever ends this process, and never given back.
        for connection in connections.values():
            _notice_lost_hosts(connection)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self, reason: str) -> NoReturn:
        """Ends all processes: each prints "error: REASON" and exits with status 2."""
        self._end(f"process {self._number}: {reason}", reason)

    def close(self) -> None:
        """Says farewell: from here on this process may end, and the others too."""
        if self._ending.acquire(blocking=False):
            self._send(FAREWELL)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for number, connection in self._connections.items():
                selector.register(
                    connection, selectors.EVENT_READ, (number, connection.makefile("rb"))
                )
            while selector.get_map():
                for key, _ in selector.select():
                    number, stream = key.data
                    line = _read_line(stream)
                    if line == FAREWELL:
                        selector.unregister(key.fileobj)
                        continue
                    reason = line.decode(errors="replace").strip() or GONE.format(number)
                    self._end(reason, reason)

    def _end(self, reason: str, own_reason: str) -> NoReturn:
        """Tells the others the one reason, and prints the other here."""
        with self._ending:
            sys.stdout.flush()
            # Not by way of sys.stderr, which the main thread may be holding. A progress bar has no line end of its own.
            os.write(2, f"\nerror: {own_reason}\n".encode())
            self._send(" ".join(reason.split()).encode() + b"\n")
            if self._number == 0:
                self._wait_for_the_others()
            # The main thread may be waiting in a collective, and JAX's exit for all processes.
            os._exit(EXIT_CODE)

    def _send(self, line: bytes) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(line)

    def _wait_for_the_others(self, seconds: float = 5) -> None:
        """JAX's coordinator lives in process 0: without it the others abort before they have said why."""
        deadline = time.monotonic() + seconds
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.settimeout(max(deadline - time.monotonic(), 0.01))
                while connection.recv(4096):
                    pass


def _notice_lost_hosts(connection: socket.socket) -> None:
    """A host that loses its power or its network closes nothing: it is gone once it has left 4 probes in 40 s unanswered."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _read_line(stream: BinaryIO) -> bytes:
    try:
        return stream.readline()
    except OSError:
        return b""
