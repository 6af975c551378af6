"""The training loop: restores or initializes the state, trains, calls hooks, exports the model."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from bitdance_jax.distributed import sharding
from bitdance_jax.distributed.consistency import check_same_config, fingerprint
from bitdance_jax.distributed.mesh import check_batch, local_rows, make_mesh, put_batch
from bitdance_jax.errors import ResourceError
from bitdance_jax.io.paths import make_folder
from bitdance_jax.io.progress import Progress, report
from bitdance_jax.perf import hardware
from bitdance_jax.train.checkpoint import Checkpoints, is_disk_full
from bitdance_jax.train.evaluation import on_host
from bitdance_jax.train.hooks import Hook, HookRunner, RunContext, check_hooks
from bitdance_jax.train.loop_hooks import EvaluationHook, loop_hooks
from bitdance_jax.train.run_folder import check_config, only_run, record_config
from bitdance_jax.train.state import (
    TrainState,
    abstract_state,
    init_state,
    learning_rate_schedule,
    make_optimizer,
)
from bitdance_jax.train.step import TrainStep, make_train_step
from bitdance_jax.train.stopping import StopSignals
from bitdance_jax.train.task import Batch, Batches, Params, Task, TrainingConfig


def train(
    task: Task,
    config: TrainingConfig,
    *,
    mesh: Mesh | None = None,
    initial: Params | None = None,
    hooks: Sequence[Hook] = (),
) -> None:
    """Trains to `run.steps` steps, from the newest checkpoint if there is one, and exports the EMA,
    or without one the parameters.

    A run that is killed at any moment and started again gives the same losses and weights as an
    uninterrupted one; on another mesh, up to rounding. The workdir contains config.json,
    model.json, checkpoints/, metrics.csv, curves.png, images/, tensorboard/ and, at the end, the
    model folder model/. Every process calls this alike.

    Args:
      task: what is trained: `config.make_task()`.
      config: stored as config.json; fields that affect the result must not change on resuming.
      mesh: the devices of all processes; None: `make_mesh(config.mesh)`.
      initial: parameters that a new run starts from, as arrays or StoredArrays (`initial_params`);
        the others are random. Ignored by a run that resumes.
      hooks: called after some of the steps, see `bitdance_jax.train.hooks`.

    Raises:
      Interrupted: SIGINT or SIGTERM was received; the state is saved.
      ConfigError: `hooks` are no hooks.
      UserError: processes differ in config, data or frozen weights, the workdir has another run or
        one that still runs, or the loss diverged.
      ResourceError: the disk is full.
    """
    run = config.run
    hooks = check_hooks(hooks)
    mesh = make_mesh(config.mesh) if mesh is None else mesh
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
    folders = run.workdir if run.checkpoints is None else f"{run.workdir} or {run.checkpoints}"
    with _disk_full_as_resource_error(folders), only_run(config):
        check_config(config)
        make_folder(workdir)
        if jax.process_index() == 0:
            record_config(config)  # Marks the folder as this run's.
        with Checkpoints(run.checkpoint_folder, run.keep) as checkpoints:
            if jax.process_index() == 0:
                task.record.write(workdir)
            state, metrics = _train_steps(task, config, mesh, checkpoints, initial, hooks)
        params, step = on_host(state.result, mesh), int(state.step)
        if jax.process_index() == 0:
            report(f"writing the model folder {workdir / 'model'}")
            task.export(params, str(workdir / "model"), step=step, metrics=metrics)
    report(f"trained {step} steps; the model is in {workdir / 'model'}")


def _train_steps(
    task: Task,
    config: TrainingConfig,
    mesh: Mesh,
    checkpoints: Checkpoints,
    initial: Params | None,
    hooks: Sequence[Hook],
) -> tuple[TrainState, dict[str, float]]:
    """The state after the last step, and its held-out metrics."""
    run = config.run
    optimizer, train_step = _make_step(task, config, mesh)
    init_key, noise_key = jax.random.split(jax.random.key(run.seed))
    state, iterator_state = _restore_or_init(
        task, config, optimizer, mesh, checkpoints, key=init_key, initial=initial
    )
    start = int(state.step)
    if start:
        report(f"resuming {run.workdir} after step {start}")

    frozen = sharding.put(mesh, task.frozen, task.objective.sharding_rules)
    feed = _Feed(
        task.batches(local_rows(mesh, task.batch_size)), iterator_state, mesh, task.batch_size
    )
    evaluation = EvaluationHook(run.preview_every)
    shown = jax.process_index() == 0
    with (
        closing(feed),
        closing(Progress(run.steps, "step", "training", initial=start, shown=shown)) as progress,
        StopSignals() as signals,
    ):
        context = RunContext(task, config, mesh, frozen, start, progress)
        all_hooks = loop_hooks(context, checkpoints=checkpoints, evaluation=evaluation, hooks=hooks)
        with HookRunner(all_hooks, context) as runner:
            for step in range(start + 1, run.steps + 1):
                runner.before_step(step, state)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = train_step(state, frozen, feed.take(), noise_key)
                stopping = signals.reached(step)
                if not stopping:
                    feed.read_ahead()  # While the devices work on this step.
                checkpoints.check()
                last = runner.after_step(
                    step, state, metrics, iterator_state=feed.iterator_state, stopping=stopping
                )
                if last:
                    break
                if stopping:
                    checkpoints.wait()
                    raise signals.interruption(f"step {step} is saved in {run.checkpoint_folder}")
            return state, evaluation.metrics_of(state)


def _make_step(
    task: Task, config: TrainingConfig, mesh: Mesh
) -> tuple[optax.GradientTransformation, TrainStep]:
    run = config.run
    schedule = learning_rate_schedule(config.optimizer, run.steps)
    optimizer = make_optimizer(config.optimizer, schedule, task.objective)
    step = make_train_step(
        task.objective,
        optimizer,
        schedule,
        mesh=mesh,
        ema_decay=config.optimizer.ema_decay,
        ema_warmup=config.optimizer.ema_warmup,
        accumulate=run.accumulate,
        gradient_dtype=run.gradient_dtype,
    )
    return optimizer, step


def _restore_or_init(
    task: Task,
    config: TrainingConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    checkpoints: Checkpoints,
    *,
    key: jax.Array,
    initial: Params | None,
) -> tuple[TrainState, dict[str, Any] | None]:
    """The state of the newest checkpoint, or a new one; and the iterator state, if restored."""
    objective = task.objective
    ema = config.optimizer.ema_decay is not None
    abstract = abstract_state(objective, optimizer, mesh, ema=ema)
    hardware.check_fits((abstract, abstract.params), "the training state with its gradients")
    restored = checkpoints.restore(abstract)
    if restored is not None:
        return restored
    init = jax.jit(
        lambda key, given: init_state(objective, optimizer, key, given, ema=ema),
        out_shardings=jax.tree.map(lambda x: x.sharding, abstract),
    )
    return init(key, sharding.put(mesh, initial or {}, objective.sharding_rules)), None


class _Feed:
    """Batches on the devices, read one ahead.

    Attributes:
      iterator_state: after the batch last taken (not the one read ahead); checkpoints contain it.
    """

    def __init__(
        self, batches: Batches, state: dict[str, Any] | None, mesh: Mesh, batch_size: int
    ) -> None:
        self._batches = batches
        self._mesh = mesh
        self._batch_size = batch_size
        if state is not None:
            batches.set_state(state)
        self._ahead: tuple[Batch, dict[str, Any]] | None = None
        self.iterator_state: dict[str, Any] = {}

    def take(self) -> Batch:
        if self._ahead is None:
            self.read_ahead()
        assert self._ahead is not None
        batch, self.iterator_state = self._ahead
        self._ahead = None
        return batch

    def read_ahead(self) -> None:
        batch = put_batch(self._mesh, next(self._batches), self._batch_size)
        self._ahead = batch, self._batches.get_state()

    def close(self) -> None:
        self._batches.close()


@contextmanager
def _disk_full_as_resource_error(folders: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise ResourceError(
                f"the disk of {folders} is full; free space and run the same command again: "
                "it resumes"
            ) from error
        raise
