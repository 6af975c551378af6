"""How the processes of a job come to be connected. What becomes of them then is in tests/train/test_multi_host.py."""

import queue
import socket
import threading

import pytest

from bitdance_jax import peers
from bitdance_jax.errors import UserError


class Store:
    """JAX's key-value store, in one process."""

    def __init__(self):
        self._values = queue.Queue()

    def key_value_set(self, key, value):
        self._values.put(value)

    def blocking_key_value_get(self, key, milliseconds):
        value = self._values.get(timeout=milliseconds / 1000)
        self._values.put(value)
        return value


@pytest.fixture
def process(monkeypatch):
    """Makes the calling thread one of three processes; returns what they share."""
    state = threading.local()
    store = Store()
    monkeypatch.setattr(peers.distributed, "global_state", state)

    def process(number):
        vars(state).update(process_id=number, num_processes=3, client=store, coordinator_address="127.0.0.1:1234")
        return store

    return process


def test_process_0_waits_for_all_and_listens_to_no_stranger(process):
    connected = {}

    def run(number):
        process(number)
        connected[number] = peers.connect()

    first = threading.Thread(target=run, args=(0,))
    first.start()
    port, _ = process(1).blocking_key_value_get("", 5000).split()
    with socket.create_connection(("127.0.0.1", int(port))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: somebody-else.example.com\r\n\r\n")
        for number in (2, 1):
            run(number)
        first.join(10)
    assert set(connected) == {0, 1, 2}
    assert set(connected[0]._connections) == {1, 2}
    for peer in connected.values():
        peer.close()  # Nobody is missed.


def test_one_that_does_not_come_is_named(process, monkeypatch):
    monkeypatch.setattr(peers, "CONNECT_SECONDS", 0.1)
    process(0)
    with pytest.raises(UserError, match=r"^processes \[1, 2\] did not reach process 0 in 0.1 s"):
        peers.connect()
