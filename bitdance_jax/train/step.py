"""One optimizer step, as a jitted function over a mesh."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bitdance_jax.distributed.constraints import constrain, split_rows
from bitdance_jax.distributed.mesh import compiler_options
from bitdance_jax.distributed.sharding import extra_rules, shardings
from bitdance_jax.nn import linear
from bitdance_jax.train.state import TrainState, abstract_state
from bitdance_jax.train.task import Batch, Metrics, Objective, Params


TrainStep = Callable[[TrainState, Params, Batch, jax.Array], tuple[TrainState, Metrics]]


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    mesh: Mesh,
    ema_decay: float | None,
    ema_warmup: bool = False,
    accumulate: int = 1,
    gradient_dtype: Literal["float32", "compute"] = "float32",
) -> TrainStep:
    """Returns the jitted `(state, frozen, batch, key) -> (state, metrics)`; it donates the old
    state.

    State and frozen weights are sharded as by `sharding.shardings`, the batch as by
    `mesh.batch_sharding`. `key` is the run's: each row's key is derived from it by the numbers of
    step and row. So the result depends neither on the mesh nor, up to rounding, on `accumulate`.
    The metrics are float32 scalars: loss, the objective's own, grad_norm (before clipping) and
    learning_rate.

    Args:
      objective: gives loss and metrics.
      optimizer: of its parameters.
      schedule: of the learning rate, for the metrics.
      mesh: the devices.
      ema_decay: of the exponential moving average of the parameters; None: there is none.
      ema_warmup: smaller decays at first (`OptimizerConfig`).
      accumulate: number of micro-batches that gradients are averaged over.
      gradient_dtype: of the sums of gradients over rows and devices (`RunConfig`).
    """
    sums = None if gradient_dtype == "compute" else jnp.dtype(gradient_dtype)
    rules = objective.sharding_rules

    def train_step(
        state: TrainState, frozen: Params, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        with (
            jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
            linear.gradient_sums(sums),
            extra_rules(rules),
        ):
            keys = row_keys(jax.random.fold_in(key, state.step), batch)
            batch = objective.prepare(batch)
            (loss, own_metrics, outputs), grads = _mean_gradients(
                objective, state, frozen, (batch, keys), accumulate
            )
            auxiliary, auxiliary_metrics = objective.update_auxiliary(
                state.auxiliary, outputs, batch, state.step
            )
            # With this constraint each device gets its part of the gradients' sum, not all of it.
            grads = jax.lax.with_sharding_constraint(grads, shardings(mesh, grads, rules))
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = state.ema
            if ema_decay is not None:
                decay: Any = ema_decay
                if ema_warmup:
                    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
                ema = optax.incremental_update(params, ema, step_size=1 - decay)
            metrics = {
                "loss": loss,
                **own_metrics,
                **auxiliary_metrics,
                "grad_norm": optax.tree.norm(grads),
                "learning_rate": schedule(state.step),
            }
            return TrainState(state.step + 1, params, ema, opt_state, auxiliary), metrics

    abstract = abstract_state(objective, optimizer, mesh, ema=ema_decay is not None)
    state_shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(state_shardings, None),
        compiler_options=compiler_options(mesh),
    )


def make_evaluation_step(
    objective: Objective, mesh: Mesh
) -> Callable[[Params, Params, Batch, jax.Array], Metrics]:
    """Returns the jitted `(params, frozen, batch, key) -> metrics` of `objective.evaluate`.

    Every device has the complete metrics, those of rows included.
    """

    def evaluation_step(params: Params, frozen: Params, batch: Batch, key: jax.Array) -> Metrics:
        with (
            jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
            extra_rules(objective.sharding_rules),
        ):
            keys = row_keys(key, batch)
            return objective.evaluate(params, frozen, objective.prepare(batch), keys)

    return jax.jit(evaluation_step, out_shardings=NamedSharding(mesh, PartitionSpec()))


def row_keys(key: jax.Array, batch: Batch) -> jax.Array:
    """A key for each row of a batch."""
    rows = len(jax.tree.leaves(batch)[0])
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(rows))
    return constrain(keys, "batch")


def _mean_gradients(
    objective: Objective, state: TrainState, frozen: Params, rows: Any, accumulate: int
) -> tuple[tuple[jax.Array, Metrics, Any], Params]:
    """Loss, metrics and gradients of (batch, keys): means over its micro-batches. And the outputs,
    stacked over micro-batches."""

    def gradients(rows: Any) -> Any:
        batch, keys = rows
        gradient = jax.value_and_grad(objective.auxiliary_loss, has_aux=True)
        (loss, (metrics, outputs)), grads = gradient(
            state.params, state.auxiliary, frozen, batch, keys, state.step
        )
        return (loss, metrics, grads), outputs

    if accumulate == 1:
        (loss, metrics, grads), outputs = gradients(rows)
        return (loss, metrics, outputs), grads

    def add(total: Any, micro_batch: Any) -> tuple[Any, Any]:
        values, outputs = gradients(micro_batch)
        return jax.tree.map(jnp.add, total, values), outputs

    micro_batches = split_rows(rows, accumulate)
    first = jax.tree.map(lambda x: x[0], micro_batches)
    values, _ = jax.eval_shape(gradients, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), values)
    total, outputs = jax.lax.scan(add, zeros, micro_batches)
    loss, metrics, grads = jax.tree.map(lambda x: x / accumulate, total)
    return (loss, metrics, outputs), grads
