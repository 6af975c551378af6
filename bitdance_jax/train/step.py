"""One optimizer step, as a pure jitted function."""

from collections.abc import Callable

import jax
import optax

from bitdance_jax.train.state import TrainState
from bitdance_jax.train.task import Batch, Task


Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


def make_train_step(task: Task, optimizer: optax.GradientTransformation, schedule: optax.Schedule, ema_decay: float) -> TrainStep:
    """Returns the jitted `(state, batch, key) -> (state, metrics)`; the old state's buffers are given up to the new one.

    `key` is the run's: the step's own is folded from it by the step number, so that a resumed run draws the same noise. The metrics are
    float32 scalars: loss, the task's own, grad_norm (before clipping) and learning_rate.
    """

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(key, state.step)
        (loss, task_metrics), grads = jax.value_and_grad(task.loss, has_aux=True)(state.params, batch, step_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, step_size=1 - ema_decay)
        metrics = {"loss": loss, **task_metrics, "grad_norm": optax.tree.norm(grads), "learning_rate": schedule(state.step)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)
