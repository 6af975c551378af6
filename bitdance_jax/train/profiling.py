"""A trace of some of a run's steps: what host and devices do, and when."""

import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from tqdm import tqdm


class Profile:
    """Traces some steps into a folder; a context manager: leaving writes a trace that has been begun.

    Process 0 traces its own devices; those of the others do the same work at the same time.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, start: int) -> None:
        """Prepares a trace.

        Args:
          steps: the first and the last step to trace; None: no trace.
          folder: where it goes.
          start: steps that the run has done already.
        """
        self._steps, self._folder = steps if jax.process_index() == 0 else None, folder
        self._running = False
        if self._steps and self._steps[1] <= start:
            _say(f"no trace is written: the run is past step {self._steps[1]}")

    def __enter__(self) -> "Profile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._running:
            self._stop()

    def before_step(self, step: int, state: Any) -> None:
        """Begins or ends the trace where it is time to. Both wait for the devices: `state` is what the step before returned."""
        if self._steps is None:
            return
        first, last = self._steps
        if self._running and step > last:
            jax.block_until_ready(state)
            self._stop()
        elif not self._running and first <= step <= last:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Every Python call would hide the steps.
            jax.profiler.start_trace(
                self._folder, create_perfetto_trace=True, profiler_options=options
            )
            self._running = True

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()
        trace = max(self._folder.glob("plugins/profile/*/perfetto_trace.json.gz"))
        _say(
            f"trace written: open {trace} at https://ui.perfetto.dev, or `pip install xprof` and `xprof --logdir {self._folder}`"
        )


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)
