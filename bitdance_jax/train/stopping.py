"""Stopping a run from outside: SIGINT, SIGTERM, SIGHUP, and the notice of a machine that is about to be taken away."""

import os
import signal
import threading
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

from bitdance_jax.errors import Interrupted


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP ask the run to save and stop instead of killing it; a second one kills as usual. A context manager.

    SIGHUP comes when a terminal is closed; `nohup` has it ignored, and so it stays. In a job of several processes a signal to any of them
    stops all after the same step. JAX's pre-emption service sees to that: it takes SIGTERM, which cloud and cluster schedulers send before
    they take a machine away, and the others are handed on to it as one.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._previous: dict[int, object] = {}
        self._alone = jax.process_count() == 1

    def __enter__(self) -> "StopSignals":
        if (
            threading.current_thread() is threading.main_thread()
        ):  # Python allows signal handlers nowhere else.
            taken = [signal.SIGINT, signal.SIGTERM] if self._alone else [signal.SIGINT]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                taken.append(signal.SIGHUP)
            self._previous = {number: signal.signal(number, self._receive) for number in taken}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def reached(self, step: int) -> bool:
        """Whether to save and stop after this step. Every process asks at every step; no device is waited for."""
        return (
            bool(self._received)
            if self._alone
            else multihost_utils.reached_preemption_sync_point(step)
        )

    def interruption(self, saved: str) -> Interrupted:
        """What to raise then; `saved` says what is kept."""
        number = self._received[0] if self._received else signal.SIGTERM
        where = "" if self._received else " to one of the processes"
        name = signal.Signals(number).name
        return Interrupted(
            f"stopped by {name}{where}; {saved}, the same command goes on from there", 128 + number
        )

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
        name = signal.Signals(number).name
        # Not by print or a bar: the signal may have come in the middle of one of theirs.
        os.write(
            2, f"\n{name}: stopping once this step is done and saved; a second one kills\n".encode()
        )
        self._restore()
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}
