"""The training loop: resume, step, log, draw, save, export."""

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from flax import traverse_util
from tqdm import tqdm

from bitdance_jax.config import OptimizerConfig, RunConfig
from bitdance_jax.errors import UserError
from bitdance_jax.train.checkpoint import Checkpoints, is_disk_full
from bitdance_jax.train.performance import Speedometer
from bitdance_jax.train.profiling import Profile
from bitdance_jax.train.recorder import Recorder
from bitdance_jax.train.state import TrainState, init_state, learning_rate_schedule, make_optimizer
from bitdance_jax.train.step import make_train_step
from bitdance_jax.train.task import Batch, Batches, Task


# What a resumed run may change without another result (`steps` moves a cosine schedule's end, which is what asking for more steps means).
_RUN_MAY_CHANGE = ("workdir", "steps", "spike", "log_every", "save_every", "preview_every", "keep", "export_dtype")
_MAY_CHANGE = re.compile(rf"run\.({'|'.join(_RUN_MAY_CHANGE)})|data\.workers|(preview|mesh|hosts|profile)(\..*)?")


class Interrupted(Exception):
    """A signal stopped the run, which is saved. `exit_code` is the shell's for that signal: 128 + its number."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def train(
    task: Task,
    run: RunConfig,
    optimizer: OptimizerConfig,
    config: dict[str, Any] | None = None,
    profile: tuple[int, int] | None = None,
) -> None:
    """Trains to `run.steps` steps, from the newest checkpoint in `run.workdir` where there is one, and exports the EMA weights.

    A run that is killed at any moment and started again gives the same losses and weights as one that is not. The workdir holds
    config.json, checkpoints/, metrics.csv, curves.png, pictures/, tensorboard/ and, at the end, the model folder model/.

    Args:
      task: what is trained.
      run: length, intervals, seed.
      optimizer: see OptimizerConfig.
      config: the whole training config as plain data (default: `run` and `optimizer`), kept as config.json; it must not change on resuming.
      profile: first and last step to trace into `profile/`.

    Raises:
      Interrupted: SIGINT or SIGTERM came; the state is saved.
      UserError: the workdir holds another run, the loss is not finite, or the disk is full.
    """
    workdir = Path(run.workdir)
    with _disk_full_is_user_error(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        with Checkpoints(workdir / "checkpoints", run.keep) as checkpoints:
            _record_config(workdir, config or {"run": asdict(run), "optimizer": asdict(optimizer)}, resuming=bool(checkpoints.steps))
            state = _train_steps(task, run, optimizer, checkpoints, profile)
        task.export(state.ema, str(workdir / "model"))
    _say(f"trained {int(state.step)} steps; the model is in {workdir / 'model'}")


def _train_steps(
    task: Task, run: RunConfig, config: OptimizerConfig, checkpoints: Checkpoints, profile: tuple[int, int] | None
) -> TrainState:
    schedule = learning_rate_schedule(config, run.steps)
    optimizer = make_optimizer(config, schedule, task)
    train_step = make_train_step(task, optimizer, schedule, config.ema_decay)
    init_key, noise_key = jax.random.split(jax.random.key(run.seed))
    init = jax.jit(lambda key: init_state(task, optimizer, key))

    restored = checkpoints.restore(jax.eval_shape(init, init_key))
    state, place = restored or (init(init_key), None)
    start = int(state.step)
    if start:
        _say(f"resuming {run.workdir} after step {start}")

    feed = _Feed(task.batches(), place)
    if start < run.steps:
        feed.read_ahead()
    speed = Speedometer(feed.batch_size, flops=0, peak=None)
    trace = Profile(profile, Path(run.workdir) / "profile", start)
    with closing(Recorder(task, run, checkpoints, start, speed)) as recorder, trace, _stop_signals() as signals:
        for step in range(start + 1, run.steps + 1):
            trace.before_step(step, state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = train_step(state, feed.take(), noise_key)
            stopping = bool(signals)
            if not stopping:
                feed.read_ahead()  # While the device works on this step.
            recorder.after_step(step, state, metrics, feed.place, stopping)
            if stopping and step < run.steps:
                name = signal.Signals(signals[0]).name
                message = f"stopped by {name}; step {step} is saved in {run.workdir}, the same command goes on from there"
                raise Interrupted(message, 128 + signals[0])
    return state


class _Feed:
    """Batches on the device, read one ahead.

    Attributes:
      place: the data's place after the batch last taken (not the one read ahead): what a checkpoint keeps.
      batch_size: of the batch last read.
    """

    def __init__(self, batches: Batches, place: dict[str, Any] | None) -> None:
        self._batches = batches
        if place is not None:
            batches.set_state(place)
        self._ahead: tuple[Batch, dict[str, Any]] | None = None
        self.place: dict[str, Any] = {}
        self.batch_size = 0

    def take(self) -> Batch:
        if self._ahead is None:
            self.read_ahead()
        assert self._ahead is not None
        batch, self.place = self._ahead
        self._ahead = None
        return batch

    def read_ahead(self) -> None:
        batch = jax.device_put(next(self._batches))
        self.batch_size = len(next(iter(batch.values())))
        self._ahead = batch, self._batches.get_state()


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT or SIGTERM into the list instead of dying of it; a second one kills as usual."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python allows signal handlers in the main thread only.
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()

    for number in previous:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


@contextmanager
def _disk_full_is_user_error(workdir: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise UserError(f"the disk of {workdir} is full; make room and run the same command again: it resumes") from error
        raise


def _record_config(workdir: Path, config: dict[str, Any], resuming: bool) -> None:
    """Writes config.json; when resuming, one that differs in what must not change is a UserError that names the fields."""
    path = workdir / "config.json"
    text = json.dumps(config, indent=2) + "\n"
    if resuming and path.exists():
        try:
            recorded = _flat(json.loads(path.read_text()))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON; restore it, or give the run another workdir") from error
        wanted = _flat(json.loads(text))
        # A field that the recorded config lacks came with a newer version of this package, and its default with the old behaviour.
        names = sorted(n for n in recorded if not _MAY_CHANGE.fullmatch(n) and recorded[n] != wanted.get(n))
        if names:
            changes = ", ".join(f"{name} was {recorded[name]!r}, now {wanted.get(name)!r}" for name in names)
            raise UserError(f"{workdir} holds a run with another config ({changes}); give this one another workdir")
    temporary = path.with_name("config.json.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(config, sep=".")


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)
