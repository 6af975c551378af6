"""Progress bars that name the current activity, and whose rate excludes compilation."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from tqdm import tqdm


REFRESH_SECONDS = 1.0

SLOW_COMPILATION = 110
"""Seconds after which a note is printed. Ten seconds later XLA asks for a bug report."""


class Progress(tqdm):
    """A progress bar that starts as "compiling".

    The time before the first units are done, and the time inside `doing`, do not count for the
    elapsed time and the rate. On a terminal the bar is refreshed meanwhile.
    """

    def __init__(
        self, total: int, unit: str, work: str, *, initial: int = 0, shown: bool = True
    ) -> None:
        """Starts the bar.

        Args:
          total: number of units.
          unit: name of a unit.
          work: description of the work after compilation.
          initial: number of units that are done already.
          shown: False: prints nothing.
        """
        super().__init__(
            total=total,
            initial=initial,
            unit=unit,
            desc="compiling",
            disable=not shown,
            dynamic_ncols=True,
        )
        self._work = work
        self._started = False
        self._refresher = _Refresher(self, compiling=True)

    def advance(self, units: int) -> None:
        """Adds finished units."""
        if self._started:
            self.update(units)
            return
        self._started = True
        self.n += units
        # `update` would attribute the time since the start to these units.
        self.initial = self.n
        self.last_print_n = self.n
        self._refresher.stop()
        self.unpause()
        self.set_description_str(self._work)

    @contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Shows another activity, such as "saving", for the `with` block."""
        if self.disable:
            yield
            return
        self._refresher.stop()
        self._refresher = _Refresher(self)
        self.set_description_str(activity)
        start = self._time()
        try:
            yield
        finally:
            self._refresher.stop()
            # `unpause` would drop the time since the bar was last printed.
            elapsed = self._time() - start
            self.start_t += elapsed
            self.last_print_t += elapsed
            self.set_description_str(self._work)

    def close(self) -> None:
        self._refresher.stop()
        super().close()


class _Refresher:
    """A thread that refreshes a bar every second, and prints a note on slow compilations."""

    def __init__(self, bar: Progress, compiling: bool = False) -> None:
        self._bar = bar
        self._compiling = compiling
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if not bar.disable:
            self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        seconds = 0
        while not self._stopped.wait(REFRESH_SECONDS):
            seconds += 1
            if self._compiling and seconds == SLOW_COMPILATION:
                self._bar.write(
                    "still compiling, which takes minutes for a large model;"
                    " XLA's message about a very slow compile is not an error",
                    file=sys.stderr,
                )
            if sys.stderr.isatty():
                self._bar.refresh()


def report(message: str) -> None:
    """Prints a line on stderr, above progress bars; process 0 alone."""
    if jax.process_index() == 0:
        tqdm.write(message, file=sys.stderr)
