"""The training state and the optimizer (paper section 4.2)."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh

from bitdance_jax.config import ConfigError, OptimizerConfig
from bitdance_jax.distributed.sharding import Rules, shardings
from bitdance_jax.train.task import Objective, Params


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes. Of jax.ShapeDtypeStructs, it describes a state to restore.

    Attributes:
      step: number of optimizer steps done, int32 scalar.
      params: the trained parameters, float32.
      ema: their exponential moving average, float32, which starts at the initial parameters; {}
        for a run without one.
      opt_state: optax state.
      auxiliary: what else the objective changes in a step (`Objective.init_auxiliary`).
    """

    step: Any
    params: Params
    ema: Params
    opt_state: Any
    auxiliary: Params = flax.struct.field(default_factory=dict)

    @property
    def result(self) -> Params:
        """The parameters that are evaluated, sampled and exported: `ema`, or `params` without
        one."""
        return self.ema or self.params


def init_state(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    given: Params | None = None,
    *,
    ema: bool = True,
) -> TrainState:
    """The state before the first step: the `given` parameters, the others from `key`. `ema`: with
    an average of the parameters."""
    params = objective.init(key)
    if given:
        params = traverse_util.unflatten_dict(
            traverse_util.flatten_dict(params) | traverse_util.flatten_dict(given)
        )
    average = jax.tree.map(jnp.copy, params) if ema else {}
    auxiliary = objective.init_auxiliary(jax.random.fold_in(key, 1))
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, average, optimizer.init(params), auxiliary)


def abstract_state(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    ema: bool = True,
) -> TrainState:
    """The state as jax.ShapeDtypeStructs with their shardings."""
    state = jax.eval_shape(
        lambda key: init_state(objective, optimizer, key, ema=ema), jax.random.key(0)
    )
    return on_mesh(mesh, state, objective.sharding_rules)


def on_mesh(mesh: Mesh, tree: Any, rules: Rules = ()) -> Any:
    """Shapes with their shardings (`sharding.shardings`)."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings(mesh, tree, rules),
    )


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of each step of a run of `steps` steps.

    Linear from 0 to the peak, then constant or a cosine to `end_learning_rate`.
    """
    peak = config.learning_rate
    warmup = config.warmup_steps
    schedules = [optax.linear_schedule(0.0, peak, max(warmup, 1)), optax.constant_schedule(peak)]
    boundaries = [warmup]
    if config.schedule == "cosine":
        start = warmup if config.decay_start is None else config.decay_start
        if start < warmup:
            raise ConfigError(
                "optimizer.decay_start must not be before the end of the warm-up, "
                f"got {start} and {warmup} warm-up steps",
                "optimizer.decay_start",
            )
        schedules.append(
            optax.cosine_decay_schedule(
                peak, max(steps - start, 1), alpha=config.end_learning_rate / peak
            )
        )
        boundaries.append(start)
    return optax.join_schedules(schedules, boundaries)


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, objective: Objective
) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm. The decoupled weight decay is scaled by the learning
    rate, and skips biases, scales and `objective.no_decay`."""

    def decayed(params: Params) -> Params:
        def decays(path: tuple[jax.tree_util.DictKey, ...], _: jax.Array) -> bool:
            names = tuple(str(key.key) for key in path)
            return names[-1] not in ("bias", "scale") and not objective.no_decay(names)

        return jax.tree_util.tree_map_with_path(decays, params)

    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    return optax.chain(clip, adamw)
