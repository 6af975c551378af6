"""Hooks of the training loop: what happens after every n steps.

`train(task, config, hooks=[...])` calls hooks in this order:

1. the loop's own: stall check, profile, divergence check, speed, progress bar, held-out metrics,
   previews;
2. those of the caller, in the order of the list;
3. the loop's own: the writer of metrics and images, the checkpoint.

So a caller's hook sees the held-out metrics of its step, what it adds to the step's metrics is
written, and a step that is in a checkpoint has been seen by all hooks.

* Step 0: no hook is called before the first step, except for `start`.
* After step n: every hook whose `every` divides n. The number of the step decides, so a resumed run
  calls the hooks after the same steps as an uninterrupted one. After a kill, hooks are called again
  for the steps since the last checkpoint.
* After the last step (`run.steps`, or the one that `StepResult.finish` chose): every hook.
* When a signal stops the run: the hooks that are due anyway, and those with `at_stop`.
* `close`: at the end, and after an error, in reverse order.

All processes call the same hooks; only process 0 should write files. An exception in a hook ends
the run without a checkpoint. What a hook remembers is not saved: on resuming, it starts again from
`start`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bitdance_jax.config.plain import Count, checked
from bitdance_jax.errors import ConfigError, short
from bitdance_jax.io.progress import Progress
from bitdance_jax.train.state import TrainState
from bitdance_jax.train.task import Metrics, Params, Task, TrainingConfig


@dataclass(frozen=True)
class RunContext:
    """What a hook may know of its run.

    Attributes:
      task: what is trained.
      config: of the run.
      mesh: the devices.
      frozen: the task's frozen weights, on the mesh.
      start: number of steps trained before this process started; 0 for a new run.
      progress: the progress bar; `progress.doing("sampling")` shows that something else is done.
    """

    task: Task
    config: TrainingConfig
    mesh: Mesh
    frozen: Params
    start: int
    progress: Progress


@dataclass
class StepResult:
    """A step that hooks are called after.

    Attributes:
      step: its number, from 1.
      state: the training state after it, on the devices. The next step overwrites it: keep no
        reference.
      iterator_state: of the training data in this process, after its batch.
      last: it is the last step of the run.
      stopping: a signal stops the run after it.
      metrics: of this step, and those that hooks have added.
      history: the metrics of every step since hooks were last called; this step's is the last.
      performance: speed and memory.
      images: that hooks have added: name -> uint8 [H, W, 3].
      image_texts: text chunks of these images, by the same name.
    """

    step: int
    state: TrainState
    iterator_state: dict[str, Any]
    last: bool
    stopping: bool
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    performance: dict[str, float] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)
    image_texts: dict[str, Mapping[str, str]] = field(default_factory=dict)
    has_additions: bool = False

    def log(self, metrics: dict[str, float]) -> None:
        """Adds metrics to this step's row in metrics.csv, which is written even if none is due."""
        self.metrics |= metrics
        self.has_additions = True

    def log_images(
        self, images: dict[str, np.ndarray], text: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Adds images to be written as images/NAME_STEP.png, with text chunks that all get."""
        self.images |= images
        self.image_texts |= dict.fromkeys(images, text)
        self.has_additions = True

    def finish(self) -> None:
        """Makes this the last step: it is saved, and the model is exported.

        All processes must decide alike: by the metrics, which are equal on all of them.
        """
        self.last = True


class Hook:
    """Base of the hooks; see the module for when they are called.

    Attributes:
      every: `after_step` is called after each step that this divides; None: whenever it is called
        for another hook.
      at_stop: it is also called when a signal stops the run.
    """

    every: int | None = 1
    at_stop: bool = False

    def start(self, run: RunContext) -> None:
        """Called once, before the first step, also when a run resumes."""

    def before_step(self, step: int, state: TrainState) -> None:
        """Called before each step, of whatever number, while the devices work on the one before.

        Must not wait for the devices, except on purpose.
        """

    def after_step(self, result: StepResult) -> None:
        """Called when the hook is due; the metrics have been fetched and checked."""

    def close(self) -> None:
        """Called once, at the end or after an error."""

    def is_due(self, result: StepResult) -> bool:
        """Whether `after_step` is called for this step."""
        if self.every is None:
            return False
        stops = self.at_stop and result.stopping
        return result.last or stops or result.step % self.every == 0


class Every(Hook):
    """Calls a function after every n steps: `Every(100, function)`."""

    def __init__(self, every: int, function: Callable[[StepResult], None]) -> None:
        self.every = checked(Count, every, "every")
        self._function = function

    def after_step(self, result: StepResult) -> None:
        self._function(result)


def check_hooks(hooks: Any) -> list[Hook]:
    """The hooks of a caller.

    Raises:
      ConfigError: they are no list of hooks, or the interval of one is not positive.
    """
    if isinstance(hooks, Hook) or not isinstance(hooks, Iterable):
        raise ConfigError(f"hooks must be a list of Hook, got {short(hooks)}", "hooks")
    several = list(hooks)
    for i, hook in enumerate(several):
        if not isinstance(hook, Hook):
            raise ConfigError(
                f"hooks[{i}] must be a Hook, such as Every(100, function), got {short(hook)}",
                "hooks",
            )
        checked(Count | None, hook.every, f"hooks[{i}].every")
    return several


class HookRunner:
    """Calls the hooks of a run; a context manager that starts and closes them.

    The metrics stay on the devices until a hook is due. Then those of all steps since are fetched
    together.
    """

    def __init__(self, hooks: Sequence[Hook], run: RunContext) -> None:
        self._hooks = hooks
        self._run = run
        self._pending: list[Metrics] = []
        self._compiled = False
        self._exit = ExitStack()

    def __enter__(self) -> "HookRunner":
        with ExitStack() as started:
            for hook in self._hooks:
                started.callback(hook.close)
                hook.start(self._run)
            self._exit = started.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit.close()

    def before_step(self, step: int, state: TrainState) -> None:
        """To be called before a step is dispatched; `state` is that after the step before."""
        for hook in self._hooks:
            hook.before_step(step, state)

    def after_step(
        self,
        step: int,
        state: TrainState,
        metrics: Metrics,
        *,
        iterator_state: dict[str, Any],
        stopping: bool,
    ) -> bool:
        """To be called after a step is dispatched.

        Args:
          step: its number, from 1.
          state: after it.
          metrics: of this step, on the devices.
          iterator_state: of the training data, after its batch.
          stopping: a signal has come: the run is to be saved and stopped.

        Returns:
          Whether this was the last step.
        """
        self._pending.append(metrics)
        self._wait()
        last = step == self._run.config.run.steps
        result = StepResult(step, state, iterator_state, last, stopping)
        if any(hook.is_due(result) for hook in self._hooks):
            rows = jax.device_get(self._pending)
            self._pending.clear()
            result.history = [{name: float(x) for name, x in row.items()} for row in rows]
            result.metrics = dict(result.history[-1])
            for hook in self._hooks:
                if hook.every is None or hook.is_due(result):
                    hook.after_step(result)
        return result.last

    def _wait(self) -> None:
        """Lets the host run one step ahead of the devices, not more.

        Otherwise batches would fill the devices' memory, and a signal would wait for all of them.
        """
        if not self._compiled:
            jax.block_until_ready(self._pending)
            self._compiled = True
        elif len(self._pending) > 1:
            jax.block_until_ready(self._pending[-2])
