"""How the processes of one job find each other, before JAX starts.

Process 0 listens at the coordinator's HOST:PORT as long as the job runs, and admits each number once. JAX's own coordinator, which ends
the whole job where a second process comes with a used number, gets a port that only the admitted are told. A challenge and response prove
who belongs to the job (HMAC-SHA256, the key is BITDANCE_SECRET); what is sent afterwards is neither signed nor encrypted. The lines:

    process 0:  bitdance_jax CHALLENGE
    process n:  NUMBER COUNT JAX_VERSION OWN_CHALLENGE PROOF
    process 0:  welcome PORT PROOF, once all are there; or: refused REASON
"""

import asyncio
import contextlib
import errno
import hmac
import ipaddress
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from bitdance_jax.errors import UserError


MEETING_SECONDS = 300
"""How long a process waits for the others."""

GREETING_SECONDS = 10
"""How long process 0 listens to somebody who has not proved yet that they belong to the job."""

MOST_GREETINGS = 64
"""Heard at a time; one more ends the oldest."""

QUIET_SECONDS = 10
"""After so long a process says what it waits for."""

LINE_BYTES = 1024
SECRET_CHARACTERS = 16


class Job(NamedTuple):
    """What a process is told of its job.

    Attributes:
      host, port: where process 0 listens.
      processes: how many there are.
      number: this one's, from 0.
    """

    host: str
    port: int
    processes: int
    number: int

    @property
    def address(self) -> str:
        return address(self.host, self.port)


class Meeting(NamedTuple):
    """The processes of a job that have found each other.

    Attributes:
      connections: process 0 has one to each other process, by number; the others have one to process 0.
      jax_port: of JAX's coordinator, on the host of process 0.
      bind_address: where JAX's coordinator listens; only process 0 knows.
    """

    connections: dict[int, socket.socket]
    jax_port: int
    bind_address: str | None = None


def address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def join(job: Job) -> Meeting:
    """Meets the other processes of the job; every process calls it once.

    Raises:
      UserError: they do not come, the port is taken, or this process does not belong to them.
    """
    return _wait_for_others(job, _secret()) if job.number == 0 else _go_to_first(job, _secret())


def _secret() -> bytes:
    """What the job's processes alone know; nothing where the network is trusted."""
    secret = os.environ.get("BITDANCE_SECRET")
    if secret is not None and len(secret) < SECRET_CHARACTERS:
        raise UserError(
            f"BITDANCE_SECRET must have at least {SECRET_CHARACTERS} characters, got {len(secret)}"
        )
    return (secret or "").encode()


def _wait_for_others(job: Job, secret: bytes) -> Meeting:
    server = _listen(job)
    bind_address = server.getsockname()[0]
    with socket.create_server((bind_address, 0), family=server.family) as free:
        jax_port = free.getsockname()[1]
    door = _Door(server, job, secret, jax_port)
    try:
        with _saying(lambda: f"waiting at {job.address} for {_processes(door.missing)}"):
            asyncio.run(door.wait_for_all())
    except TimeoutError:
        who, where = _processes(door.missing), job.address
        reason = f"{who} did not come to process 0 at {where} in {MEETING_SECONDS} s; are they started, and not shut off?"
        door.dismiss(reason)
        server.close()
        raise UserError(reason) from None
    door.welcome()
    threading.Thread(target=lambda: asyncio.run(door.serve()), name="door", daemon=True).start()
    return Meeting(door.arrived, jax_port, bind_address)


def _listen(job: Job) -> socket.socket:
    """At the coordinator's address where it is one of this host; at all addresses where it is a name, or a router translates it."""
    host = "127.0.0.1" if job.host == "localhost" else job.host
    try:
        with contextlib.suppress(
            ValueError
        ):  # A name, which may mean another address here than on the other hosts.
            family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
            try:
                return socket.create_server((host, job.port), family=family)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
        both = socket.has_dualstack_ipv6()
        return socket.create_server(
            ("", job.port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
        )
    except OSError as error:
        taken = "is taken, by another job or by another process 0"
        why = (
            taken
            if error.errno == errno.EADDRINUSE
            else f"cannot be listened at ({os.strerror(error.errno or 0)})"
        )
        raise UserError(
            f"port {job.port} of process 0 {why}; give all processes another coordinator HOST:PORT"
        ) from error


class _Door:
    """Process 0's side: answers all who come, side by side, and keeps the connections of those who belong to the job.

    Attributes:
      arrived: these connections, by number.
    """

    def __init__(self, server: socket.socket, job: Job, secret: bytes, jax_port: int) -> None:
        server.setblocking(False)
        self._server, self._job, self._secret, self._jax_port = server, job, secret, jax_port
        self.arrived: dict[int, socket.socket] = {}
        self._challenges: dict[int, str] = {}
        self._complaints: set[str] = set()
        self._change = asyncio.Event()
        self._watches: set[asyncio.Task[None]] = set()

    @property
    def missing(self) -> list[int]:
        return [number for number in range(1, self._job.processes) if number not in self.arrived]

    async def wait_for_all(self) -> None:
        """Raises a TimeoutError if some do not come."""
        serving = asyncio.create_task(self.serve())
        async with asyncio.timeout(MEETING_SECONDS):
            while self.missing:
                await self._change.wait()
                self._change.clear()
        serving.cancel()

    async def serve(self) -> None:
        """Answers whoever comes, for ever."""
        greetings: list[asyncio.Task[None]] = []
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(self._server)
            except OSError:  # As many files are open as may be.
                await asyncio.sleep(1)
                continue
            greetings = [task for task in greetings if not task.done()]
            greetings.append(asyncio.create_task(self._answer(connection)))
            if len(greetings) > MOST_GREETINGS:
                greetings[0].cancel()

    async def _answer(self, connection: socket.socket) -> None:
        """Admits or refuses one."""
        loop, challenge, admitted = asyncio.get_running_loop(), secrets.token_hex(16), False
        try:
            connection.setblocking(False)
            async with asyncio.timeout(GREETING_SECONDS):
                await loop.sock_sendall(connection, f"bitdance_jax {challenge}\n".encode())
                number, count, version, own_challenge, proof = (
                    await _receive_line(connection)
                ).split()
                if not _proves(
                    proof, self._secret, challenge, number, count, version, own_challenge
                ):
                    refusal = (
                        "its BITDANCE_SECRET is not that of process 0; give all processes the same"
                    )
                else:
                    refusal = self._refusal(int(number), int(count), version)
                if refusal:
                    await loop.sock_sendall(connection, f"refused {refusal}\n".encode())
                else:
                    self._admit(int(number), connection, own_challenge)
                    admitted = True
        except (OSError, ValueError):
            pass  # Left, silent for too long, or somebody who says something else.
        finally:
            if not admitted:
                connection.close()

    def _refusal(self, number: int, count: int, version: str) -> str:
        """Why a process that proved to belong to the job cannot join; "" if it can."""
        if count != self._job.processes:
            reason = f"it was told of {count} processes, and process 0 of {self._job.processes}; give all the same number"
        elif version != jax.__version__:
            reason = f"it has JAX {version}, and process 0 {jax.__version__}; install the same on all hosts"
        elif number not in self.missing:
            reason = f"a process {number} is there already; give each process its own number, and each job its own port"
        else:
            return ""
        if (
            self.missing
            and reason not in self._complaints
            and len(self._complaints) < MOST_GREETINGS
        ):
            self._complaints.add(reason)
            _say(f"process {number} may not join: {reason}")
        return reason

    def _admit(self, number: int, connection: socket.socket, challenge: str) -> None:
        async def notice_leaving() -> None:
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().sock_recv(connection, 1)
            connection.close()
            del self.arrived[number]

        self.arrived[number], self._challenges[number] = connection, challenge
        self._watches.add(asyncio.create_task(notice_leaving()))
        self._change.set()

    def welcome(self) -> None:
        for number, challenge in self._challenges.items():
            words = ("welcome", str(self._jax_port), challenge)
            self._send(number, f"welcome {self._jax_port} {_proof(self._secret, *words)}")

    def dismiss(self, reason: str) -> None:
        for number, connection in self.arrived.items():
            self._send(number, f"refused {reason}")
            connection.close()

    def _send(self, number: int, line: str) -> None:
        with contextlib.suppress(OSError):  # Who reads the connection notices one that is gone.
            self.arrived[number].setblocking(True)
            self.arrived[number].sendall(line.encode() + b"\n")


async def _receive_line(connection: socket.socket) -> str:
    line = b""
    while not line.endswith(b"\n"):
        part = await asyncio.get_running_loop().sock_recv(connection, LINE_BYTES)
        line += part
        if not part or len(line) > LINE_BYTES:
            raise ConnectionError("no greeting")
    return line.decode("ascii")


def _go_to_first(job: Job, secret: bytes) -> Meeting:
    """Tries until process 0 is there."""
    deadline, problem = time.monotonic() + MEETING_SECONDS, ""
    with _saying(lambda: f"process {job.number} waits for the others at {job.address}{problem}"):
        while True:
            try:
                return _greet_first(job, secret)
            except OSError as error:
                problem = f" ({error.strerror or error})"
            if time.monotonic() > deadline:
                who, where = f"process {job.number}", f"process 0 at {job.address}"
                raise UserError(
                    f"{who} did not reach {where} in {MEETING_SECONDS} s{problem}; is it started, and not shut off?"
                )
            time.sleep(0.2)


def _greet_first(job: Job, secret: bytes) -> Meeting:
    """One attempt. Raises an OSError where another makes sense."""
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(
            socket.create_connection((job.host, job.port), timeout=GREETING_SECONDS)
        )
        service, _, challenge = _read_line(connection).partition(" ")
        if service != "bitdance_jax":
            raise ConnectionError("something else answers there")
        own_challenge = secrets.token_hex(16)
        words = (str(job.number), str(job.processes), jax.__version__, own_challenge)
        connection.sendall(" ".join((*words, _proof(secret, challenge, *words))).encode() + b"\n")
        connection.settimeout(MEETING_SECONDS + GREETING_SECONDS)  # Process 0 ends the waiting.
        answer, _, rest = _read_line(connection).partition(" ")
        if answer == "refused":
            raise UserError(
                f"process {job.number} may not join the job at {job.address}: {_printable(rest)}"
            )
        port, _, proof = rest.partition(" ")
        if (
            answer != "welcome"
            or not port.isdecimal()
            or not _proves(proof, secret, "welcome", port, own_challenge)
        ):
            raise UserError(
                f"what answers at {job.address} does not know this process's BITDANCE_SECRET; give all processes the same"
            )
        connection.settimeout(None)
        stack.pop_all()
        return Meeting({0: connection}, int(port))


def _read_line(connection: socket.socket) -> str:
    """Not a byte more than the line: what follows is for another reader."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        line += byte
        if not byte or len(line) > LINE_BYTES:
            raise ConnectionError("it hung up")
    return line.decode(errors="replace").strip()


def _proof(secret: bytes, *words: str) -> str:
    return hmac.digest(secret, " ".join(words).encode(), "sha256").hex()


def _proves(proof: str, secret: bytes, *words: str) -> bool:
    return hmac.compare_digest(proof.encode(), _proof(secret, *words).encode())


def _processes(numbers: list[int]) -> str:
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


@contextlib.contextmanager
def _saying(text: Callable[[], str]) -> Iterator[None]:
    """Says what is waited for if it takes long."""
    timer = threading.Timer(QUIET_SECONDS, lambda: _say(text()))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
