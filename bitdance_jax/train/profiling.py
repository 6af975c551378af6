"""A trace of some of a run's steps: what host and devices do, and when."""

from pathlib import Path

import jax

from bitdance_jax.io.progress import report
from bitdance_jax.train.hooks import Hook, RunContext
from bitdance_jax.train.state import TrainState


class ProfileHook(Hook):
    """Traces some steps into the folder `profile` of the run.

    Process 0 traces its own devices; those of the others do the same work at the same time.
    """

    every = None

    def __init__(self, steps: tuple[int, int] | None) -> None:
        """`steps`: the first and the last step to trace; None: no trace."""
        self._steps = steps if jax.process_index() == 0 else None
        self._running = False

    def start(self, run: RunContext) -> None:
        self._folder = Path(run.config.run.workdir) / "profile"
        if self._steps is not None and self._steps[1] <= run.start:
            report(f"no trace is written: the run is past step {self._steps[1]}")

    def before_step(self, step: int, state: TrainState) -> None:
        """Starts or ends the trace if it is time to; both wait for the devices."""
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

    def close(self) -> None:
        """Writes a trace that was started."""
        if self._running:
            self._stop()

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()
        trace = max(self._folder.glob("plugins/profile/*/perfetto_trace.json.gz"))
        report(
            f"trace written: open {trace} at https://ui.perfetto.dev, "
            f"or `pip install xprof` and `xprof --logdir {self._folder}`"
        )
