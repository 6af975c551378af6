"""Progress bars that say what is being done, and whose rate is that of the work alone."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


SECOND = 1.0
SLOW_COMPILATION = 110
"""Seconds; ten more, and XLA asks for a bug report."""


class Progress(tqdm):
    """A bar that begins with "compiling": what comes before the first units are done counts neither as time nor for the rate.

    The same goes for what is done inside `doing`. On a terminal the seconds go on meanwhile.
    """

    def __init__(
        self, total: int, unit: str, work: str, *, initial: int = 0, shown: bool = True
    ) -> None:
        """`total` units, `initial` of them done already; `work` is what is being done once it is compiled."""
        super().__init__(
            total=total,
            initial=initial,
            unit=unit,
            desc="compiling",
            disable=not shown,
            dynamic_ncols=True,
        )
        self._work, self._started = work, False
        self._clock = _Clock(self, compiles=True)

    def advance(self, units: int) -> None:
        """So many units more are done."""
        if self._started:
            self.update(units)
            return
        self._started = True
        self.n += units
        self.initial = self.last_print_n = (
            self.n
        )  # `update` would take the time since the start for theirs
        self._clock.stop()
        self.unpause()
        self.set_description_str(self._work)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Something else is done inside, such as saving."""
        if self.disable:
            yield
            return
        self._clock.stop()
        self._clock = _Clock(self)
        self.set_description_str(what)
        start = self._time()
        try:
            yield
        finally:
            self._clock.stop()
            away = (
                self._time() - start
            )  # not `unpause`, which would leave out what was done since the bar was last drawn
            self.start_t += away
            self.last_print_t += away
            self.set_description_str(self._work)

    def close(self) -> None:
        self._clock.stop()
        super().close()


class _Clock:
    """Shows a bar anew every second, and explains what XLA says of slow compilations."""

    def __init__(self, bar: Progress, compiles: bool = False) -> None:
        self._bar, self._compiles = bar, compiles
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if not bar.disable:
            self._thread.start()

    def stop(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        seconds = 0
        while not self._over.wait(SECOND):
            seconds += 1
            if self._compiles and seconds == SLOW_COMPILATION:
                note = "still compiling, which takes minutes for a large model; XLA's question about a very slow compile is no error"
                self._bar.write(note, file=sys.stderr)
            if sys.stderr.isatty():
                self._bar.refresh()
