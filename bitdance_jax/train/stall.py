"""Ends a run that is alive and stuck, so that its scheduler can start it again."""

import statistics
import threading
import time
from collections import deque
from typing import NamedTuple

from bitdance_jax.distributed import multihost
from bitdance_jax.train.hooks import Hook, RunContext, StepResult
from bitdance_jax.train.state import TrainState


MEDIANS = 20
"""How many times the median a step may take."""

OTHER_WORK = 6
"""How many times as long a step may take that compiles or after which other hooks are called."""

WINDOW = 100
"""Steps of the median."""

TICK = 0.5
"""Seconds."""


class _Wait(NamedTuple):
    """What a run waits for.

    Attributes:
      step: its number.
      seconds: how long it may take.
      median: seconds of a step; None before the second one.
    """

    step: int
    seconds: float
    median: float | None


class StallHook(Hook):
    """Ends all processes when a step takes too long (`RunConfig.stall_minutes`).

    Each prints the stacks of all its threads; then come the line and the exit status of an error. A
    thread counts the time in ticks, so that the time for which this process or machine is suspended
    does not count.
    """

    every = None

    def __init__(self, minutes: float | None) -> None:
        """`minutes`: that a step may take; None: without a limit."""
        self._floor = None if minutes is None else 60 * minutes
        self._durations: deque[float] = deque(maxlen=WINDOW)
        self._closed = threading.Event()
        self._began = 0.0

    def start(self, run: RunContext) -> None:
        self._first = run.start + 1
        self._wait_for(self._first, OTHER_WORK)
        if self._floor is not None:
            threading.Thread(target=self._watch, name="stall", daemon=True).start()

    def before_step(self, step: int, state: TrainState) -> None:
        now = time.monotonic()
        if step > self._first + 1:  # The first one compiles.
            self._durations.append(now - self._began)
        self._began = now
        self._wait_for(step, OTHER_WORK if step == self._first else 1)

    def after_step(self, result: StepResult) -> None:
        self._wait_for(result.step, OTHER_WORK)

    def close(self) -> None:
        self._closed.set()

    def _wait_for(self, step: int, times: int) -> None:
        median = statistics.median(self._durations) if self._durations else None
        seconds = max(times * (self._floor or 0.0), MEDIANS * (median or 0.0))
        self._waiting = _Wait(step, seconds, median)

    def _watch(self) -> None:
        waiting, seconds = self._waiting, 0.0
        while not self._closed.wait(TICK):
            seconds += TICK
            if self._waiting is not waiting:
                waiting, seconds = self._waiting, 0.0
            if seconds > waiting.seconds:
                multihost.stop_all(_reason(waiting), stacks=True)


def _reason(waiting: _Wait) -> str:
    median = "" if waiting.median is None else f", where the median is {waiting.median:.2g} s"
    return (
        f"step {waiting.step} is stuck: it has taken {waiting.seconds:.0f} s{median}; the stacks "
        "of all threads are printed above; the same command resumes from what is saved"
    )
