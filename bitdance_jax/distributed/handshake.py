"""How a process joins a job: the messages between process 0 and another process.

    process 0:  bitdance_jax CHALLENGE
    process n:  PROCESS_ID NUM_PROCESSES JAX_VERSION OWN_CHALLENGE PROOF
    process 0:  welcome PORT PROOF, once all processes have connected; or: refused REASON

Each message is one line. A proof is the HMAC-SHA256 of the other side's challenge and of the
message; the key is BITDANCE_SECRET. What follows is neither signed nor encrypted.
"""

import asyncio
import contextlib
import hmac
import os
import secrets
import socket

import jax

from bitdance_jax.distributed.job import Job
from bitdance_jax.errors import UserError


HANDSHAKE_SECONDS = 10
"""Process 0 closes a connection that has not finished its part of the handshake by then."""

LINE_BYTES = 1024
SECRET_CHARACTERS = 16


def read_secret() -> bytes:
    """BITDANCE_SECRET, or nothing where the network is trusted.

    Raises:
      UserError: it is too short.
    """
    secret = os.environ.get("BITDANCE_SECRET")
    if secret is not None and len(secret) < SECRET_CHARACTERS:
        raise UserError(
            f"BITDANCE_SECRET must have at least {SECRET_CHARACTERS} characters, got {len(secret)}"
        )
    return (secret or "").encode()


def make_proof(secret: bytes, *words: str) -> str:
    return hmac.digest(secret, " ".join(words).encode(), "sha256").hex()


def is_proof(proof: str, secret: bytes, *words: str) -> bool:
    return hmac.compare_digest(proof.encode(), make_proof(secret, *words).encode())


async def receive_line(connection: socket.socket) -> str:
    """The first line from a non-blocking connection.

    Raises:
      OSError: the connection was closed, or the line is too long.
      ValueError: the line is not ASCII.
    """
    line = b""
    while not line.endswith(b"\n"):
        part = await asyncio.get_running_loop().sock_recv(connection, LINE_BYTES)
        line += part
        if not part or len(line) > LINE_BYTES:
            raise ConnectionError("no greeting")
    return line.decode("ascii")


def connect(job: Job, secret: bytes, *, wait_seconds: int | float) -> tuple[socket.socket, int]:
    """One attempt of another process to join the job.

    Args:
      job: of this process.
      secret: of the job.
      wait_seconds: how long process 0 may wait for the other processes.

    Returns:
      The connection to process 0, and the port of JAX's coordinator.

    Raises:
      OSError: process 0 does not answer; another attempt may succeed.
      UserError: process 0 refuses this process, or does not know the secret.
    """
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(
            socket.create_connection((job.host, job.port), timeout=HANDSHAKE_SECONDS)
        )
        service, _, challenge = _read_line(connection).partition(" ")
        if service != "bitdance_jax":
            raise ConnectionError("another service answers there")
        own_challenge = secrets.token_hex(16)
        words = (str(job.process_id), str(job.num_processes), jax.__version__, own_challenge)
        proof = make_proof(secret, challenge, *words)
        connection.sendall(f"{' '.join(words)} {proof}\n".encode())
        # Process 0 gives up first.
        connection.settimeout(wait_seconds + HANDSHAKE_SECONDS)
        answer, _, rest = _read_line(connection).partition(" ")
        if answer == "refused":
            raise UserError(
                f"process {job.process_id} may not join the job at {job.address}: "
                f"{_printable(rest)}"
            )
        port, _, proof = rest.partition(" ")
        valid = answer == "welcome" and port.isdecimal()
        if not (valid and is_proof(proof, secret, "welcome", port, own_challenge)):
            raise UserError(
                f"the process at {job.address} has another BITDANCE_SECRET; "
                "give all processes the same one"
            )
        connection.settimeout(None)
        stack.pop_all()
        return connection, int(port)


def _read_line(connection: socket.socket) -> str:
    """One line. Reads no byte after it: the watchdog reads those."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        line += byte
        if not byte or len(line) > LINE_BYTES:
            raise ConnectionError("the connection was closed")
    return line.decode(errors="replace").strip()


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)
