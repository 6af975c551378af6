"""The training loop: resume, step, log, draw, save, export."""

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from bitdance_jax.distributed import sharding
from bitdance_jax.distributed.consistency import check_same_config, fingerprint
from bitdance_jax.distributed.mesh import check_batch, local_rows, put_batch
from bitdance_jax.errors import UserError
from bitdance_jax.io.paths import make_folder
from bitdance_jax.perf import hardware
from bitdance_jax.train.checkpoint import Checkpoints, is_disk_full
from bitdance_jax.train.evaluation import Evaluation, on_host
from bitdance_jax.train.performance import Speedometer, peak_flops, training_flops
from bitdance_jax.train.profiling import Profile
from bitdance_jax.train.recorder import Recorder
from bitdance_jax.train.run_folder import check_config, only_run, record_config
from bitdance_jax.train.state import (
    TrainState,
    abstract_state,
    init_state,
    learning_rate_schedule,
    make_optimizer,
)
from bitdance_jax.train.step import make_train_step
from bitdance_jax.train.stopping import StopSignals
from bitdance_jax.train.task import Batch, Batches, Params, Task, TrainingConfig


def train(task: Task, config: TrainingConfig, mesh: Mesh, initial: Params | None = None) -> None:
    """Trains to `run.steps` steps, from the newest checkpoint in `run.workdir` where there is one, and exports the EMA weights.

    A run that is killed at any moment and started again gives the same losses and weights as one that is not; on another mesh, the same but
    for rounding. The workdir holds config.json, model.json, checkpoints/, metrics.csv, curves.png, images/, tensorboard/ and, at the
    end, the model folder model/.

    Args:
      task: what is trained.
      config: kept as config.json; what decides the result must not change on resuming.
      mesh: devices of all processes (`make_mesh`); every process calls this alike.
      initial: parameters that a new run starts from, as numpy arrays; the others are drawn. A run that has checkpoints does not look at it.

    Raises:
      Interrupted: SIGINT or SIGTERM came; the state is saved.
      UserError: processes differ in config, data or frozen weights, the workdir holds another run or one
        that is still going, the loss is not finite, or the disk is full.
    """
    run = config.run
    workdir = Path(run.workdir)
    check_same_config(
        config,
        batch_size=task.batch_size,
        steps_per_epoch=task.steps_per_epoch,
        held_out_size=task.held_out_size,
        frozen_weights=fingerprint(task.frozen),
        initial_weights=fingerprint(initial),
    )
    check_batch(mesh, task.batch_size, run.accumulate)
    places = run.workdir if run.checkpoints is None else f"{run.workdir} or {run.checkpoints}"
    with _disk_full_is_user_error(places), only_run(config):
        check_config(config)
        make_folder(workdir)
        if jax.process_index() == 0:
            record_config(config)  # From here on the folder is known for this run's.
        with Checkpoints(run.checkpoint_folder, run.keep) as checkpoints:
            if jax.process_index() == 0:
                task.record.write(workdir)
            state, figures = _train_steps(task, config, mesh, checkpoints, initial)
        params = on_host(state.ema, mesh)
        if jax.process_index() == 0:
            _say(f"writing the model folder {workdir / 'model'}")
            task.export(params, str(workdir / "model"), step=int(state.step), metrics=figures)
    _say(f"trained {int(state.step)} steps; the model is in {workdir / 'model'}")


def _train_steps(
    task: Task, config: TrainingConfig, mesh: Mesh, checkpoints: Checkpoints, initial: Params | None
) -> tuple[TrainState, dict[str, float]]:
    """The state after the last step, and its held-out figures."""
    run, objective = config.run, task.objective
    schedule = learning_rate_schedule(config.optimizer, run.steps)
    optimizer = make_optimizer(config.optimizer, schedule, objective)
    train_step = make_train_step(
        objective,
        optimizer,
        schedule,
        config.optimizer.ema_decay,
        mesh,
        run.accumulate,
        run.gradient_dtype,
    )
    init_key, noise_key = jax.random.split(jax.random.key(run.seed))
    places = sharding.shardings(mesh, abstract := abstract_state(objective, optimizer, mesh))
    hardware.check_fits((abstract, abstract.params), "the training state with its gradients")

    restored = checkpoints.restore(abstract)
    if restored:
        state, place = restored
    else:
        draw = jax.jit(
            lambda key, given: init_state(objective, optimizer, key, given), out_shardings=places
        )
        state, place = draw(init_key, sharding.put(mesh, initial or {})), None
    start = int(state.step)
    if start:
        _say(f"resuming {run.workdir} after step {start}")

    frozen = sharding.put(mesh, task.frozen)
    evaluation = Evaluation(task, frozen, mesh)
    feed = _Feed(task.batches(local_rows(mesh, task.batch_size)), place, mesh, task.batch_size)
    peak = peak_flops(mesh)
    if peak is None:
        _say(
            f"model FLOP utilisation is left out: the peak of {mesh.devices.flat[0].device_kind} is not known"
        )
    speed = Speedometer(task.batch_size, training_flops(objective, task.batch_size), peak)
    trace = Profile(config.profile, Path(run.workdir) / "profile", start)
    with (
        closing(Recorder(task, run, checkpoints, start, speed, evaluation)) as recorder,
        trace,
        StopSignals() as signals,
    ):
        for step in range(start + 1, run.steps + 1):
            trace.before_step(step, state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = train_step(state, frozen, feed.take(), noise_key)
            stopping = signals.reached(step)
            if not stopping:
                feed.read_ahead()  # While the devices work on this step.
            checkpoints.check()
            recorder.after_step(step, state, metrics, feed.place, stopping)
            if stopping and step < run.steps:
                checkpoints.wait()
                raise signals.interruption(f"step {step} is saved in {run.checkpoint_folder}")
    return state, recorder.held_out or evaluation.figures(state.ema)


class _Feed:
    """Batches on the devices, read one ahead.

    Attributes:
      place: the data's place after the batch last taken (not the one read ahead): what a checkpoint keeps.
    """

    def __init__(
        self, batches: Batches, place: dict[str, Any] | None, mesh: Mesh, batch_size: int
    ) -> None:
        self._batches, self._mesh, self._batch_size = batches, mesh, batch_size
        if place is not None:
            batches.set_state(place)
        self._ahead: tuple[Batch, dict[str, Any]] | None = None
        self.place: dict[str, Any] = {}

    def take(self) -> Batch:
        if self._ahead is None:
            self.read_ahead()
        assert self._ahead is not None
        batch, self.place = self._ahead
        self._ahead = None
        return batch

    def read_ahead(self) -> None:
        batch = put_batch(self._mesh, next(self._batches), self._batch_size)
        self._ahead = batch, self._batches.get_state()


@contextmanager
def _disk_full_is_user_error(places: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise UserError(
                f"the disk of {places} is full; make room and run the same command again: it resumes"
            ) from error
        raise


def _say(message: str) -> None:
    if jax.process_index() == 0:
        tqdm.write(message, file=sys.stderr)
