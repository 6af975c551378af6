"""One optimizer step, as a pure jitted function over a mesh."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from bitdance_jax.distributed import sharding
from bitdance_jax.distributed.constraints import constrain, split_rows
from bitdance_jax.distributed.mesh import compiler_options
from bitdance_jax.nn import linear
from bitdance_jax.train.state import TrainState, abstract_state
from bitdance_jax.train.task import Batch, Objective, Params


Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Params, Batch, jax.Array], tuple[TrainState, Metrics]]


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    ema_decay: float,
    mesh: Mesh,
    accumulate: int = 1,
    gradient_dtype: Literal["float32", "compute"] = "float32",
) -> TrainStep:
    """Returns the jitted `(state, frozen, batch, key) -> (state, metrics)`; the old state's buffers are given up to the new one.

    State and frozen weights lie as `sharding.shardings` says, the batch as `batch_sharding`. `key` is the run's: every row's own
    is folded from it by the step's number and the row's, so that the result depends neither on the mesh nor, but for rounding, on
    `accumulate`, the number of micro-batches whose gradients are averaged. The metrics are float32 scalars: loss, the objective's own,
    grad_norm (before clipping) and learning_rate. `gradient_dtype` is what each micro-batch's gradients are summed in over its rows and
    the devices (`RunConfig`).
    """
    sums = None if gradient_dtype == "compute" else jnp.dtype(gradient_dtype)

    def train_step(
        state: TrainState, frozen: Params, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), linear.gradient_sums(sums):
            keys = row_keys(jax.random.fold_in(key, state.step), batch)
            loss, task_metrics, grads = _mean_gradients(
                objective, state.params, frozen, (batch, keys), accumulate
            )
            # Said here, the gradients' sum over devices leaves each with its own part, and not all with all of it.
            grads = jax.lax.with_sharding_constraint(grads, sharding.shardings(mesh, grads))
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = optax.incremental_update(params, state.ema, step_size=1 - ema_decay)
            metrics = {
                "loss": loss,
                **task_metrics,
                "grad_norm": optax.tree.norm(grads),
                "learning_rate": schedule(state.step),
            }
            return TrainState(state.step + 1, params, ema, opt_state), metrics

    places = jax.tree.map(lambda x: x.sharding, abstract_state(objective, optimizer, mesh))
    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(places, None),
        compiler_options=compiler_options(mesh),
    )


def make_evaluation_step(
    objective: Objective, mesh: Mesh
) -> Callable[[Params, Params, Batch, jax.Array], Metrics]:
    """Returns the jitted `(params, frozen, batch, key) -> figures` of `objective.evaluate`."""

    def evaluation_step(params: Params, frozen: Params, batch: Batch, key: jax.Array) -> Metrics:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return objective.evaluate(params, frozen, batch, row_keys(key, batch))

    return jax.jit(evaluation_step)


def row_keys(key: jax.Array, batch: Batch) -> jax.Array:
    """A key for each row of a batch."""
    rows = len(jax.tree.leaves(batch)[0])
    return constrain(
        jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(rows)), "batch"
    )


def _mean_gradients(
    objective: Objective, params: Params, frozen: Params, rows: Any, accumulate: int
) -> tuple[jax.Array, Metrics, Params]:
    """Loss, metrics and gradients of (batch, keys), means over its micro-batches."""

    def gradients(rows: Any) -> Any:
        batch, keys = rows
        return jax.value_and_grad(objective.loss, has_aux=True)(params, frozen, batch, keys)

    if accumulate == 1:
        (loss, metrics), grads = gradients(rows)
        return loss, metrics, grads

    def add(total: Any, micro_batch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients(micro_batch)), None

    parts = split_rows(rows, accumulate)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], parts)),
    )
    total, _ = jax.lax.scan(add, zeros, parts)
    (loss, metrics), grads = jax.tree.map(lambda x: x / accumulate, total)
    return loss, metrics, grads
