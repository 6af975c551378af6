"""Process 0's side of the rendezvous: it admits the processes of the job and refuses others."""

import asyncio
import contextlib
import secrets
import socket
import sys

import jax

from bitdance_jax.distributed import handshake
from bitdance_jax.distributed.job import Job


MAX_HANDSHAKES = 64
"""At a time; a further connection closes the oldest."""


class Admission:
    """Answers connections concurrently, and keeps those of the processes that belong to the job.

    Attributes:
      connections: those of the admitted processes, by their process id.
    """

    def __init__(
        self, server: socket.socket, job: Job, *, secret: bytes, coordinator_port: int
    ) -> None:
        server.setblocking(False)
        self.connections: dict[int, socket.socket] = {}
        self._server = server
        self._job = job
        self._secret = secret
        self._coordinator_port = coordinator_port
        self._challenges: dict[int, str] = {}
        self._printed: set[str] = set()
        self._admitted = asyncio.Event()
        self._watches: set[asyncio.Task[None]] = set()

    @property
    def missing(self) -> list[int]:
        """The ids of the processes that have not been admitted yet."""
        ids = range(1, self._job.num_processes)
        return [process_id for process_id in ids if process_id not in self.connections]

    async def wait_for_all(self, seconds: int | float) -> None:
        """Returns once all processes have been admitted.

        Raises:
          TimeoutError: some are still missing.
        """
        serving = asyncio.create_task(self.serve())
        async with asyncio.timeout(seconds):
            while self.missing:
                await self._admitted.wait()
                self._admitted.clear()
        serving.cancel()

    async def serve(self) -> None:
        """Answers every connection. Never returns."""
        handshakes: list[asyncio.Task[None]] = []
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(self._server)
            except OSError:  # Too many open files.
                await asyncio.sleep(1)
                continue
            handshakes = [task for task in handshakes if not task.done()]
            handshakes.append(asyncio.create_task(self._answer(connection)))
            if len(handshakes) > MAX_HANDSHAKES:
                handshakes[0].cancel()

    def welcome(self) -> None:
        """Gives all admitted processes the port of JAX's coordinator."""
        port = str(self._coordinator_port)
        for process_id, challenge in self._challenges.items():
            proof = handshake.make_proof(self._secret, "welcome", port, challenge)
            self._send(process_id, f"welcome {port} {proof}")

    def dismiss(self, reason: str) -> None:
        """Refuses the processes that were admitted so far, and closes their connections."""
        for process_id, connection in self.connections.items():
            self._send(process_id, f"refused {reason}")
            connection.close()

    async def _answer(self, connection: socket.socket) -> None:
        """Process 0's part of one handshake."""
        admitted = False
        try:
            connection.setblocking(False)
            async with asyncio.timeout(handshake.HANDSHAKE_SECONDS):
                admitted = await self._decide(connection)
        except (OSError, ValueError):
            pass  # Closed, silent for too long, or not one of our processes.
        finally:
            if not admitted:
                connection.close()

    async def _decide(self, connection: socket.socket) -> bool:
        """Whether the process at the other end was admitted."""
        loop = asyncio.get_running_loop()
        challenge = secrets.token_hex(16)
        await loop.sock_sendall(connection, f"bitdance_jax {challenge}\n".encode())
        *words, proof = (await handshake.receive_line(connection)).split()
        process_id, num_processes, version, own_challenge = words
        if handshake.is_proof(proof, self._secret, challenge, *words):
            refusal = self._refusal(int(process_id), int(num_processes), version)
        else:
            refusal = "its BITDANCE_SECRET is not that of process 0; give all processes the same"
        if refusal:
            await loop.sock_sendall(connection, f"refused {refusal}\n".encode())
        else:
            self._admit(int(process_id), connection, own_challenge)
        return not refusal

    def _refusal(self, process_id: int, num_processes: int, version: str) -> str:
        """Why a process that knows the secret cannot join; "" if it can."""
        if num_processes != self._job.num_processes:
            reason = (
                f"it was started as one of {num_processes} processes, and process 0 as one of "
                f"{self._job.num_processes}; give all the same number"
            )
        elif version != jax.__version__:
            reason = (
                f"it has JAX {version}, and process 0 {jax.__version__}; "
                "install the same version on all hosts"
            )
        elif process_id not in self.missing:
            reason = (
                f"a process {process_id} has joined already; "
                "give each process its own id, and each job its own port"
            )
        else:
            return ""
        if self.missing and len(self._printed) < MAX_HANDSHAKES and reason not in self._printed:
            self._printed.add(reason)
            print(f"process {process_id} may not join: {reason}", file=sys.stderr, flush=True)
        return reason

    def _admit(self, process_id: int, connection: socket.socket, challenge: str) -> None:
        async def remove_when_closed() -> None:
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().sock_recv(connection, 1)
            connection.close()
            del self.connections[process_id]

        self.connections[process_id] = connection
        self._challenges[process_id] = challenge
        self._watches.add(asyncio.create_task(remove_when_closed()))
        self._admitted.set()

    def _send(self, process_id: int, line: str) -> None:
        # The watchdog, which reads the connection, notices a process that is gone.
        with contextlib.suppress(OSError):
            self.connections[process_id].setblocking(True)
            self.connections[process_id].sendall(line.encode() + b"\n")
