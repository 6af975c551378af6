"""Short training runs of tasks, for the tests of what is trained."""

import dataclasses
from functools import partial

import jax
import numpy as np
import optax

from bitdance_jax.config import (
    MeshConfig,
    OptimizerConfig,
)
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.train.evaluation import Evaluation
from bitdance_jax.train.state import init_state, make_optimizer
from bitdance_jax.train.step import make_train_step


SIZE = 16
STEPS = 40
ROWS = np.arange(16)
MESH = make_mesh(MeshConfig(), jax.devices()[:1])


def train(task, learning_rate, steps=STEPS):
    """The state after some steps at a constant rate, and the loss of each."""
    objective, schedule = task.objective, optax.constant_schedule(learning_rate)
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.0), schedule, objective)
    step = make_train_step(objective, optimizer, schedule, mesh=MESH, ema_decay=0.9)
    state = jax.jit(partial(init_state, objective, optimizer))(jax.random.key(0))
    batches, losses = task.batches(ROWS), []
    for _ in range(steps):
        state, metrics = step(state, task.frozen, next(batches), jax.random.key(1))
        losses.append(float(metrics["loss"]))
    return state, losses


def evaluate(task, params):
    return Evaluation(task, task.frozen, MESH).metrics(params)


def gradient_dtypes(task, params):
    keys, batch = jax.random.split(jax.random.key(0), 16), task.objective.abstract_batch(16)
    gradients, _ = jax.eval_shape(
        jax.grad(task.objective.loss, has_aux=True), params, task.frozen, batch, keys
    )
    return dtypes(gradients)


def dtypes(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


def replace_run(config, **changes):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **changes))


def check_batches(task):
    """Batches and frozen weights are what the objective expects; a process gets its own rows."""
    for batch in (next(task.batches(ROWS)), next(task.held_out(ROWS))):
        assert jax.eval_shape(lambda x: x, batch) == task.objective.abstract_batch(16)
    assert jax.eval_shape(lambda x: x, task.frozen) == task.objective.abstract_frozen()
    complete = next(task.batches(ROWS))
    rows = next(task.batches(np.array([3, 4])))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[3:5]), rows, complete)


def decayed(task, params):
    """Which parameters change in a step without gradients: a tree of bools."""
    schedule = optax.constant_schedule(0.1)
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5), schedule, task.objective)
    gradients = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(
        lambda gradients, params: optimizer.update(gradients, optimizer.init(params), params)
    )(gradients, params)
    params, updates = jax.device_get((params, updates))
    for param, update in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        assert not update.any() or np.allclose(update, -0.05 * param, rtol=1e-5)
    return jax.tree.map(lambda update: update != 0, updates)
