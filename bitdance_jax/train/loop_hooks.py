"""The loop's own hooks: stall and divergence checks, speed, progress bar, held-out metrics,
previews, the writer of metrics and images, and checkpoints."""

from collections.abc import Sequence
from pathlib import Path

import jax

from bitdance_jax.distributed import multihost
from bitdance_jax.errors import UserError
from bitdance_jax.io.progress import report
from bitdance_jax.train.checkpoint import Checkpoints
from bitdance_jax.train.divergence import DivergenceCheck
from bitdance_jax.train.evaluation import Evaluation, on_one_device
from bitdance_jax.train.hooks import Hook, RunContext, StepResult
from bitdance_jax.train.metrics import MetricsWriter
from bitdance_jax.train.performance import Speedometer, memory, peak_flops, training_flops
from bitdance_jax.train.profiling import ProfileHook
from bitdance_jax.train.stall import StallHook
from bitdance_jax.train.state import TrainState


def loop_hooks(
    run: RunContext,
    *,
    checkpoints: Checkpoints,
    evaluation: "EvaluationHook",
    hooks: Sequence[Hook] = (),
) -> list[Hook]:
    """All hooks of a run, in order: the loop's own around the caller's `hooks`."""
    intervals = run.config.run
    return [
        StallHook(intervals.stall_minutes),
        ProfileHook(run.config.profile),
        DivergenceHook(intervals.spike, checkpoints),
        SpeedHook(),
        ProgressHook(),
        evaluation,
        PreviewHook(intervals.preview_every),
        *hooks,
        MetricsHook(intervals.log_every),
        CheckpointHook(intervals.save_every, checkpoints),
    ]


class DivergenceHook(Hook):
    """Ends the run if the loss of any step since hooks were last called diverged
    (`DivergenceCheck`).

    It comes before all hooks that write or save.
    """

    every = None

    def __init__(self, spike: float | None, checkpoints: Checkpoints) -> None:
        self._check = DivergenceCheck(spike)
        self._checkpoints = checkpoints

    def after_step(self, result: StepResult) -> None:
        first = result.step - len(result.history) + 1
        for step, metrics in enumerate(result.history, start=first):
            problem = self._check.problem(metrics)
            if problem is not None:
                raise UserError(
                    f"{problem} at step {step} ({self._last_checkpoint()}); try a lower "
                    "optimizer.learning_rate or a longer warm-up, in another workdir"
                )

    def _last_checkpoint(self) -> str:
        self._checkpoints.wait()
        steps = self._checkpoints.steps
        return f"the last checkpoint is of step {steps[-1]}" if steps else "nothing is saved yet"


class SpeedHook(Hook):
    """Adds speed and memory to a step's results; compilation and other hooks do not count."""

    every = None

    def start(self, run: RunContext) -> None:
        peak = peak_flops(run.mesh)
        if peak is None:
            kind = run.mesh.devices.flat[0].device_kind
            report(f"model FLOP utilisation is not reported: the peak of {kind} is not known")
        batch_size = run.task.batch_size
        objective = run.task.objective
        flops = round(training_flops(objective, batch_size) * objective.mean_work)
        self._speedometer = Speedometer(batch_size, flops, peak)
        self._start = run.start
        self._running = False

    def before_step(self, step: int, state: TrainState) -> None:
        # The first step compiles.
        if not self._running and step > self._start + 1:
            self._speedometer.restart(step - 1)
            self._running = True

    def after_step(self, result: StepResult) -> None:
        counts = [row["images"] for row in result.history if "images" in row]
        images = sum(counts) / len(counts) if counts else None
        speed = self._speedometer.read(result.step, images) if self._running else {}
        result.performance = speed | memory(jax.local_devices())
        self._running = False


class ProgressHook(Hook):
    """Advances the progress bar, and shows metrics in it."""

    every = None

    def start(self, run: RunContext) -> None:
        self._progress = run.progress
        self._shown = run.start

    def before_step(self, step: int, state: TrainState) -> None:
        self._advance(step - 1)

    def after_step(self, result: StepResult) -> None:
        self._advance(result.step)
        self._progress.set_postfix_str(_summary(result.metrics | result.performance))

    def _advance(self, step: int) -> None:
        if step > self._shown:
            self._progress.advance(step - self._shown)
            self._shown = step


class EvaluationHook(Hook):
    """Adds the metrics of the held-out records, with the prefix "eval_"."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._newest: tuple[int, dict[str, float]] | None = None

    def start(self, run: RunContext) -> None:
        self._progress = run.progress
        self._evaluation = Evaluation(run.task, run.frozen, run.mesh)

    def after_step(self, result: StepResult) -> None:
        with self._progress.doing("evaluating"):
            metrics = self._evaluation.metrics(result.state.result)
        self._newest = result.step, metrics
        result.log({f"eval_{name}": value for name, value in metrics.items()})

    def metrics_of(self, state: TrainState) -> dict[str, float]:
        """The metrics, without the prefix, of a state; not computed again for that of the last
        call."""
        if self._newest is not None and self._newest[0] == int(state.step):
            return self._newest[1]
        return self._evaluation.metrics(state.result)

    def close(self) -> None:
        self._evaluation.close()


class PreviewHook(Hook):
    """Adds the task's previews."""

    def __init__(self, every: int) -> None:
        self.every = every

    def start(self, run: RunContext) -> None:
        self._run = run

    def after_step(self, result: StepResult) -> None:
        task = self._run.task
        params = result.state.result
        with self._run.progress.doing("previewing"):
            if task.previews_on_mesh:
                images = task.preview(params, result.step)
            else:
                params = on_one_device(params, self._run.mesh)
                images = task.preview(params, result.step) if jax.process_index() == 0 else {}
            if jax.process_index() == 0:
                result.log_images(images, self._text(result.step))

    def _text(self, step: int) -> dict[str, str]:
        """Text chunks: the run, the step and, of samples, the sampler, as `Pipeline.metadata`."""
        run = self._run.config.run
        text = {"model": run.workdir, "step": str(step)}
        sampler = self._run.task.record.metadata.get("sampler")
        if sampler:
            text |= {"seed": str(run.seed), **{name: str(x) for name, x in sampler.items()}}
        return text


class MetricsHook(Hook):
    """Writes a row of metrics at its interval and whenever a hook has added some, and the images.

    The row has the metrics of its own step, not means over the steps since the last row: a resumed
    run repeats it exactly, wherever it was saved. Process 0 alone writes.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._writer: MetricsWriter | None = None

    def start(self, run: RunContext) -> None:
        self._steps_per_epoch = run.task.steps_per_epoch
        if jax.process_index() == 0:
            self._writer = MetricsWriter(Path(run.config.run.workdir), run.start)

    def is_due(self, result: StepResult) -> bool:
        return result.has_additions or super().is_due(result)

    def after_step(self, result: StepResult) -> None:
        if self._writer is None:
            return
        metrics = result.metrics
        if self._steps_per_epoch is not None:
            metrics = {"epoch": result.step / self._steps_per_epoch, **metrics}
        self._writer.write(result.step, metrics, result.performance)
        if result.images or result.last:
            self._writer.write_images(result.step, result.images, result.image_texts)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class CheckpointHook(Hook):
    """Saves the state. Every process calls it: each writes its part."""

    at_stop = True

    def __init__(self, every: int, checkpoints: Checkpoints) -> None:
        self.every = every
        self._checkpoints = checkpoints

    def start(self, run: RunContext) -> None:
        self._progress = run.progress

    def after_step(self, result: StepResult) -> None:
        with self._progress.doing("saving, then stopping" if result.stopping else "saving"):
            iterator_state = multihost.merged(result.iterator_state)
            self._checkpoints.save(result.step, result.state, iterator_state)


def _summary(metrics: dict[str, float]) -> str:
    """One line for the progress bar."""
    formats = {
        "loss": "loss {:.4g}",
        "grad_norm": "gradient {:.3g}",
        "learning_rate": "learning rate {:.2g}",
        "images_per_second": "{:.4g} images/s",
        "model_flop_utilisation": "{:.1%} MFU",
        "memory_gib": "{:.1f} GiB",
    }
    shown = [text.format(metrics[name]) for name, text in formats.items() if name in metrics]
    return ", ".join(shown)
