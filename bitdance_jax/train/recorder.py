"""What is done with the results of a run's steps: checked, logged, drawn and saved."""

from pathlib import Path
from typing import Any

import jax

from bitdance_jax.config import RunConfig
from bitdance_jax.errors import UserError
from bitdance_jax.io.progress import Progress
from bitdance_jax.train.checkpoint import Checkpoints
from bitdance_jax.train.divergence import DivergenceCheck
from bitdance_jax.train.evaluation import Evaluation
from bitdance_jax.train.metrics import MetricsWriter
from bitdance_jax.train.performance import Speedometer, memory
from bitdance_jax.train.state import TrainState
from bitdance_jax.train.step import Metrics
from bitdance_jax.train.task import Task


class Recorder:
    """Logs, draws and saves, each at its interval and all at the last step. Every process calls it alike; process 0 alone writes.

    The figures of every step stay on the device until one of these comes, when they are fetched together, and each is checked before
    anything is written. A logged row is that of its own step, not a mean over those since the last row: a resumed run repeats it exactly,
    wherever it was saved.

    Attributes:
      held_out: the last figures of held-out images; None before there are any.
    """

    def __init__(
        self,
        task: Task,
        run: RunConfig,
        checkpoints: Checkpoints,
        start: int,
        speed: Speedometer,
        evaluation: Evaluation,
    ) -> None:
        """`start`: steps done already."""
        self._task, self._run, self._checkpoints, self._speed, self._evaluation = (
            task,
            run,
            checkpoints,
            speed,
            evaluation,
        )
        self._writes = jax.process_index() == 0
        self._writer = MetricsWriter(Path(run.workdir), start) if self._writes else None
        self._progress = Progress(run.steps, "step", "training", initial=start, shown=self._writes)
        self._divergence = DivergenceCheck(run.spike)
        self._unchecked: list[Metrics] = []
        self._compiled = False
        self.held_out: dict[str, float] | None = None

    def after_step(
        self, step: int, state: TrainState, metrics: Metrics, place: dict[str, Any], stopping: bool
    ) -> None:
        """Takes a step's results; rows and images are written before its checkpoint, so that a resumed run has no gap in them.

        Args:
          step: number of the step, from 1.
          state: after it.
          metrics: its figures, on the devices.
          place: of the data after it.
          stopping: save now.

        Raises:
          UserError: a step since the last look diverged; nothing after it is saved.
        """
        self._unchecked.append(metrics)
        self._wait(step)
        self._progress.advance(1)
        run, last = self._run, step == self._run.steps
        previews = last or step % run.preview_every == 0
        logs = previews or step % run.log_every == 0
        saves = last or stopping or step % run.save_every == 0
        if not (logs or saves):
            return
        figures = self._fetch(step)
        if logs:
            self._log(step, figures, state, previews)
        if saves:
            with self._progress.doing("saving, then stopping" if stopping else "saving"):
                self._checkpoints.save(step, state, place)
        self._speed.restart(step)

    def close(self) -> None:
        self._progress.close()
        if self._writer:
            self._writer.close()

    def _wait(self, step: int) -> None:
        """Lets the host run one step ahead of the devices and no further: batches would pile up there, and a signal would wait for all."""
        if not self._compiled:
            jax.block_until_ready(self._unchecked)
            self._compiled = True
            self._speed.restart(step)
        elif len(self._unchecked) > 1:
            jax.block_until_ready(self._unchecked[-2])

    def _fetch(self, step: int) -> dict[str, float]:
        """The figures of this step, once it and those before it are found sound."""
        rows = jax.device_get(self._unchecked)
        for number, row in enumerate(rows, start=step - len(rows) + 1):
            complaint = self._divergence.complaint(float(row["loss"]), float(row["grad_norm"]))
            if complaint:
                self._checkpoints.wait()
                steps = self._checkpoints.steps
                kept = (
                    f"the last checkpoint is of step {steps[-1]}"
                    if steps
                    else "nothing is saved yet"
                )
                mend = "a lower optimizer.learning_rate or a longer warm-up, in another workdir"
                raise UserError(f"{complaint} at step {number} ({kept}); try {mend}")
        self._unchecked.clear()
        return {name: float(value) for name, value in rows[-1].items()}

    def _log(self, step: int, figures: dict[str, float], state: TrainState, previews: bool) -> None:
        used = self._speed.read(step) | memory(jax.local_devices())
        self._progress.set_postfix_str(_summary(figures | used))
        images = {}
        if previews:
            with self._progress.doing("evaluating"):
                self.held_out = self._evaluation.figures(state.ema)
            figures |= {f"eval_{name}": value for name, value in self.held_out.items()}
            with self._progress.doing("drawing"):
                images = self._evaluation.images(state.ema, step)
        if self._writer:
            self._writer.write(step, {"epoch": step / self._task.steps_per_epoch, **figures}, used)
            if previews:
                self._writer.write_images(step, images)


def _summary(figures: dict[str, float]) -> str:
    """One line for the progress bar, of the figures that there are."""
    forms = {
        "loss": "loss {:.4g}",
        "grad_norm": "gradient {:.3g}",
        "learning_rate": "learning rate {:.2g}",
        "images_per_second": "{:.4g} images/s",
        "model_flop_utilisation": "{:.1%} MFU",
        "memory_gib": "{:.1f} GiB",
    }
    return ", ".join(form.format(figures[name]) for name, form in forms.items() if name in figures)
