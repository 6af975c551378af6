"""How the processes of a job find each other. Later failures: tests/train/test_multi_host.py."""

import contextlib
import hmac
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from bitdance_jax.distributed import admission, handshake, rendezvous
from bitdance_jax.distributed.job import Job
from bitdance_jax.distributed.rendezvous import join
from bitdance_jax.errors import UserError


@pytest.fixture
def job():
    """Process 0's view of a job of three."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return Job("127.0.0.1", free.getsockname()[1], 3, 0)


@pytest.fixture
def pool():
    """Each process is a thread here."""
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture
def connect(job):
    """Opens a connection to the job's port that says nothing."""
    with contextlib.ExitStack() as stack:

        def connect() -> socket.socket:
            for _ in range(500):
                with contextlib.suppress(ConnectionRefusedError):
                    connection = socket.create_connection((job.host, job.port), timeout=20)
                    return stack.enter_context(connection)
                time.sleep(0.01)
            raise AssertionError("nobody listens")

        yield connect


def close(*all_connections):
    for connections in all_connections:
        for connection in connections.sockets.values():
            connection.close()


def test_all_join_despite_silent_strangers(job, pool, connect, monkeypatch):
    monkeypatch.setenv("BITDANCE_SECRET", "a secret of the three")
    first = pool.submit(join, job)
    strangers = [connect() for _ in range(admission.MAX_HANDSHAKES + 10)]
    strangers[-1].sendall(b"GET / HTTP/1.1\r\nHost: somebody-else.example.com\r\n\r\n")
    start = time.monotonic()
    others = [pool.submit(join, job._replace(process_id=process_id)) for process_id in (2, 1)]
    zero, two, one = (connections.result(20) for connections in (first, *others))
    assert time.monotonic() - start < handshake.HANDSHAKE_SECONDS / 2
    assert set(zero.sockets) == {1, 2}
    assert set(one.sockets) == set(two.sockets) == {0}
    assert zero.coordinator_port == one.coordinator_port == two.coordinator_port != job.port
    one.sockets[0].sendall(b"one\n")
    two.sockets[0].sendall(b"two\n")
    assert [zero.sockets[number].recv(10) for number in (1, 2)] == [b"one\n", b"two\n"]
    # A process that comes later is refused, and the others do not notice.
    with pytest.raises(UserError, match="a process 1 has joined already"):
        join(job._replace(process_id=1))
    close(zero, one, two)


def test_a_silent_connection_is_closed(job, pool, connect, monkeypatch):
    monkeypatch.setattr(handshake, "HANDSHAKE_SECONDS", 0.2)
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 0.7)
    first = pool.submit(join, job)
    stranger = connect()
    assert stranger.recv(100).startswith(b"bitdance_jax ")
    assert stranger.recv(100) == b""
    with pytest.raises(UserError):
        first.result(20)


def test_all_processes_name_the_missing_one(job, pool, monkeypatch, capfd):
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 2)
    monkeypatch.setattr(rendezvous, "QUIET_SECONDS", 1)
    processes = [pool.submit(join, job), pool.submit(join, job._replace(process_id=2))]
    for process in processes:
        with pytest.raises(UserError, match=f"process 1 did not connect .*{job.address}"):
            process.result(20)
    assert f"waiting at {job.address} for process 1\n" in capfd.readouterr().err


def test_without_process_0_an_error_names_it(job, monkeypatch):
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 0.3)
    with pytest.raises(UserError, match=r"process 2 .* process 0 at .* \(Connection refused\)"):
        join(job._replace(process_id=2))


@pytest.mark.parametrize(
    ("words", "secret", "refusal"),
    [
        ((1, 4, jax.__version__), "", "one of 4 processes"),
        ((3, 3, jax.__version__), "", "process 3 has joined already"),
        ((1, 3, "0.1"), "", "JAX 0.1"),
        ((1, 3, jax.__version__), "another", "BITDANCE_SECRET"),
    ],
    ids=["count", "id", "JAX", "secret"],
)
def test_a_process_that_differs_is_refused_and_its_place_stays_free(
    job, pool, connect, words, secret, refusal
):
    first = pool.submit(join, job)
    connection = connect()
    greet(connection, words, secret)
    answer = connection.recv(1000).decode()
    assert answer.startswith("refused ")
    assert refusal in answer
    others = [pool.submit(join, job._replace(process_id=process_id)) for process_id in (1, 2)]
    close(first.result(20), *(other.result(20) for other in others))


def greet(connection: socket.socket, words: tuple[int | str, ...], secret: str = "") -> None:
    """The message of a process that joins."""
    _, challenge = connection.recv(1000).decode().split()
    said = [*map(str, words), "challenge"]
    proof = hmac.digest(secret.encode(), " ".join([challenge, *said]).encode(), "sha256").hex()
    connection.sendall(" ".join([*said, proof]).encode() + b"\n")


def test_a_process_killed_while_it_waits_can_be_replaced(job, pool, connect):
    first = pool.submit(join, job)
    killed = connect()
    greet(killed, (1, 3, jax.__version__))
    two = pool.submit(join, job._replace(process_id=2))
    killed.close()
    one = pool.submit(join, job._replace(process_id=1))
    close(first.result(20), one.result(20), two.result(20))


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["bitdance_jax challenge", f"welcome 1234 {'0' * 64}"], "BITDANCE_SECRET"),
        (["HTTP/1.1 400 Bad Request"], "another service"),
        ([], "connection was closed"),
    ],
    ids=["an impostor", "a web server", "nobody"],
)
def test_only_process_0_is_accepted(job, pool, monkeypatch, lines, problem):
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 0)
    with socket.create_server((job.host, job.port)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                for line in lines:
                    connection.sendall(f"{line}\n".encode())
                    if line.startswith("bitdance_jax"):
                        connection.recv(1000)

        answering = pool.submit(answer)
        with pytest.raises(UserError, match=f"{job.address} .*{problem}"):
            join(job._replace(process_id=1))
        answering.result(20)


def test_a_port_in_use(job):
    with (
        socket.create_server((job.host, job.port)),
        pytest.raises(UserError, match=f"port {job.port} of process 0 is in use"),
    ):
        join(job)


def test_a_short_secret(job, monkeypatch):
    monkeypatch.setenv("BITDANCE_SECRET", "short")
    with pytest.raises(UserError, match=r"BITDANCE_SECRET .*16.* 5"):
        join(job)


ANYWHERE = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        ("a-name.example.com", ANYWHERE),
        ("192.0.2.1", ANYWHERE),
    ],
    ids=["this host", "localhost", "a name", "an address that a router translates"],
)
def test_where_process_0_listens(job, host, address):
    with rendezvous._listen(job._replace(host=host)) as server:
        assert server.getsockname()[0] == address
