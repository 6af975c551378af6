"""How the processes of a job find each other. What becomes of them then is in tests/train/test_multi_host.py."""

import contextlib
import hmac
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from bitdance_jax.distributed import rendezvous
from bitdance_jax.distributed.rendezvous import Job, join
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
def opened(job):
    """Connects to the job's port as somebody who says nothing."""
    with contextlib.ExitStack() as stack:

        def opened() -> socket.socket:
            for _ in range(500):
                with contextlib.suppress(ConnectionRefusedError):
                    return stack.enter_context(
                        socket.create_connection((job.host, job.port), timeout=20)
                    )
                time.sleep(0.01)
            raise AssertionError("nobody listens")

        yield opened


def close(*meetings):
    for meeting in meetings:
        for connection in meeting.connections.values():
            connection.close()


def test_all_meet_and_silent_strangers_keep_nobody_away(job, pool, opened, monkeypatch):
    monkeypatch.setenv("BITDANCE_SECRET", "a secret of the three")
    first = pool.submit(join, job)
    strangers = [opened() for _ in range(rendezvous.MOST_GREETINGS + 10)]
    strangers[-1].sendall(b"GET / HTTP/1.1\r\nHost: somebody-else.example.com\r\n\r\n")
    start = time.monotonic()
    others = [pool.submit(join, job._replace(number=number)) for number in (2, 1)]
    zero, two, one = (meeting.result(20) for meeting in (first, *others))
    assert time.monotonic() - start < rendezvous.GREETING_SECONDS / 2
    assert set(zero.connections) == {1, 2} and set(one.connections) == set(two.connections) == {0}
    assert zero.jax_port == one.jax_port == two.jax_port != job.port
    one.connections[0].sendall(b"one\n")
    two.connections[0].sendall(b"two\n")
    assert [zero.connections[number].recv(10) for number in (1, 2)] == [b"one\n", b"two\n"]
    with pytest.raises(
        UserError, match="a process 1 is there already"
    ):  # The others do not notice.
        join(job._replace(number=1))
    close(zero, one, two)


def test_who_says_nothing_is_sent_away(job, pool, opened, monkeypatch):
    monkeypatch.setattr(rendezvous, "GREETING_SECONDS", 0.2)
    monkeypatch.setattr(rendezvous, "MEETING_SECONDS", 0.7)
    first = pool.submit(join, job)
    stranger = opened()
    assert stranger.recv(100).startswith(b"bitdance_jax ") and stranger.recv(100) == b""
    with pytest.raises(UserError):
        first.result(20)


def test_those_that_do_not_come_are_named_to_all_that_did(job, pool, monkeypatch, capfd):
    monkeypatch.setattr(rendezvous, "MEETING_SECONDS", 2)
    monkeypatch.setattr(rendezvous, "QUIET_SECONDS", 1)
    processes = [pool.submit(join, job), pool.submit(join, job._replace(number=2))]
    for process in processes:
        with pytest.raises(
            UserError, match=rf"process 1 did not come to process 0 at 127.0.0.1:{job.port} in 2 s"
        ):
            process.result(20)
    assert f"waiting at {job.address} for process 1\n" in capfd.readouterr().err
    monkeypatch.setattr(rendezvous, "MEETING_SECONDS", 0.3)
    with pytest.raises(
        UserError, match=r"process 2 did not reach process 0 at .* in 0.3 s \(Connection refused\)"
    ):
        join(job._replace(number=2))


@pytest.mark.parametrize(
    ("words", "secret", "refusal"),
    [
        (
            (1, 4, jax.__version__),
            "",
            "it was told of 4 processes, and process 0 of 3; give all the same number",
        ),
        (
            (3, 3, jax.__version__),
            "",
            "a process 3 is there already; give each process its own number, and each job its own port",
        ),
        (
            (1, 3, "0.1"),
            "",
            f"it has JAX 0.1, and process 0 {jax.__version__}; install the same on all hosts",
        ),
        (
            (1, 3, jax.__version__),
            "another",
            "its BITDANCE_SECRET is not that of process 0; give all processes the same",
        ),
    ],
    ids=["count", "number", "JAX", "secret"],
)
def test_who_differs_may_not_join_and_who_does_not_still_can(
    job, pool, opened, words, secret, refusal
):
    first = pool.submit(join, job)
    connection = opened()
    greet(connection, words, secret)
    assert connection.recv(1000).decode() == f"refused {refusal}\n"
    others = [pool.submit(join, job._replace(number=number)) for number in (1, 2)]
    close(first.result(20), *(other.result(20) for other in others))


def greet(connection: socket.socket, words: tuple[int | str, ...], secret: str = "") -> None:
    """As a process does."""
    _, challenge = connection.recv(1000).decode().split()
    said = [*map(str, words), "challenge"]
    proof = hmac.digest(secret.encode(), " ".join([challenge, *said]).encode(), "sha256").hex()
    connection.sendall(" ".join([*said, proof]).encode() + b"\n")


def test_one_that_left_while_it_waited_may_come_again(job, pool, opened):
    first = pool.submit(join, job)
    killed = opened()
    greet(killed, (1, 3, jax.__version__))
    two = pool.submit(join, job._replace(number=2))
    killed.close()
    one = pool.submit(join, job._replace(number=1))
    close(first.result(20), one.result(20), two.result(20))


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (
            ["bitdance_jax challenge", f"welcome 1234 {'0' * 64}"],
            "does not know this process's BITDANCE_SECRET",
        ),
        (
            ["HTTP/1.1 400 Bad Request"],
            r"did not reach process 0 at .* \(something else answers there\)",
        ),
        ([], r"did not reach process 0 at .* \(it hung up\)"),
    ],
    ids=["an impostor", "a web server", "nobody"],
)
def test_what_answers_must_be_process_0(job, pool, monkeypatch, lines, complaint):
    monkeypatch.setattr(rendezvous, "MEETING_SECONDS", 0)
    with socket.create_server((job.host, job.port)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                for line in lines:
                    connection.sendall(f"{line}\n".encode())
                    if line.startswith("bitdance_jax"):
                        connection.recv(1000)

        answering = pool.submit(answer)
        with pytest.raises(UserError, match=complaint):
            join(job._replace(number=1))
        answering.result(20)


def test_a_port_that_is_taken(job):
    with (
        socket.create_server((job.host, job.port)),
        pytest.raises(UserError, match=f"port {job.port} of process 0 is taken, by another"),
    ):
        join(job)


def test_a_secret_that_is_easily_guessed(job, monkeypatch):
    monkeypatch.setenv("BITDANCE_SECRET", "short")
    with pytest.raises(UserError, match="BITDANCE_SECRET must have at least 16 characters, got 5"):
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
def test_process_0_listens_no_further_than_the_coordinator_is_seen(job, host, address):
    with rendezvous._listen(job._replace(host=host)) as server:
        assert server.getsockname()[0] == address
