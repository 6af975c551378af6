"""What worker processes do about signals, and about the end of their parent.

Schedulers signal every process of a run. The parent alone handles that: its workers load images
until the step is done and saved.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator


_STOPPING = {
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
}
_CAN_BLOCK = hasattr(signal, "pthread_sigmask")


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """Blocks the signals that stop a run, in this thread: worker processes that start in the block
    inherit that.

    Python blocks for ever if a worker ends before it has read what it is started with.
    """
    if not _CAN_BLOCK:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent(index: int = 0, count: int = 1) -> None:
    """In a worker process: ignores the signals that stop a run, except for the parent's SIGTERM,
    and ends the worker when the parent ends or is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    for number in _STOPPING - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        # Threads that run already have inherited this from `starting_workers`.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_if_terminated, args=(parent.pid,), daemon=True).start()
    elif _CAN_BLOCK:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_if_terminated(parent: int | None) -> None:
    """Waits for a SIGTERM of the parent, by which multiprocessing ends workers."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(0)
