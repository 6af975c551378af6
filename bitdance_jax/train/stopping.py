"""Stopping a run by SIGINT, SIGTERM or SIGHUP, also when a scheduler preempts the machine."""

import os
import signal
import threading
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

from bitdance_jax.errors import Interrupted


class StopSignals:
    """A context manager in which SIGINT, SIGTERM and SIGHUP let the run save and stop.

    A second signal kills as usual. SIGHUP is sent when a terminal is closed; it stays ignored under
    `nohup`. In a job of several processes a signal to any of them stops all after the same step, by
    JAX's preemption service: it handles SIGTERM, which schedulers send before they preempt a
    machine, and the other signals are passed to it as SIGTERM.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._previous: dict[int, object] = {}
        self._alone = jax.process_count() == 1

    def __enter__(self) -> "StopSignals":
        if (
            threading.current_thread() is threading.main_thread()
        ):  # Python allows signal handlers in no other thread.
            handled = [signal.SIGINT, signal.SIGTERM] if self._alone else [signal.SIGINT]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                handled.append(signal.SIGHUP)
            self._previous = {number: signal.signal(number, self._receive) for number in handled}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def reached(self, step: int) -> bool:
        """Whether to save and stop after this step. Every process calls this after every step."""
        return (
            bool(self._received)
            if self._alone
            else multihost_utils.reached_preemption_sync_point(step)
        )

    def interruption(self, saved: str) -> Interrupted:
        """The exception to raise then; `saved` says what is saved."""
        number = self._received[0] if self._received else signal.SIGTERM
        where = "" if self._received else " to one of the processes"
        name = signal.Signals(number).name
        return Interrupted(
            f"stopped by {name}{where}; {saved}, the same command resumes from there", 128 + number
        )

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
        name = signal.Signals(number).name
        # Not printed: the signal may have interrupted a print.
        message = f"\n{name}: stopping once this step is done and saved; a second signal kills\n"
        os.write(2, message.encode())
        self._restore()
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}
