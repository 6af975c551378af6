"""Metrics of the EMA weights on held-out records, and gathering those weights."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bitdance_jax.distributed.mesh import local_rows, put_batch
from bitdance_jax.train.step import make_evaluation_step
from bitdance_jax.train.task import Params, Task


MAX_RECORDS = 1000


class Evaluation:
    """Means of the objective's metrics over held-out records, with the same noise at every call.

    At most MAX_RECORDS of them, in full batches, at least one. If there are fewer records than a
    batch has rows, some count twice.
    """

    def __init__(self, task: Task, frozen: Params, mesh: Mesh) -> None:
        """`frozen`: the task's weights on the mesh."""
        self._task = task
        self._frozen = frozen
        self._mesh = mesh
        self._step = make_evaluation_step(task.objective, mesh)
        self._batches = task.held_out(local_rows(mesh, task.batch_size))
        self._start = self._batches.get_state()

    def metrics(self, params: Params) -> dict[str, float]:
        """The metrics of parameters on the mesh. Every process must call it."""
        size = self._task.batch_size
        self._batches.set_state(self._start)
        rows = []
        for i in range(max(1, min(self._task.held_out_size, MAX_RECORDS) // size)):
            batch = put_batch(self._mesh, next(self._batches), size)
            rows.append(jax.device_get(self._step(params, self._frozen, batch, jax.random.key(i))))
        scalars = [name for name, value in rows[0].items() if np.ndim(value) == 0]
        means = {name: math.fsum(float(row[name]) for row in rows) / len(rows) for name in scalars}
        # Of a batch larger than the held-out set, the last rows are repetitions.
        features = {
            name: np.concatenate([row[name] for row in rows])[: self._task.held_out_size]
            for name in rows[0].keys() - means.keys()
        }
        return means | (self._task.objective.summarize(features) if features else {})

    def close(self) -> None:
        """Ends what loads the records."""
        self._batches.close()


def on_one_device(params: Params, mesh: Mesh) -> Params:
    """Complete parameters on the first device of this process. Every process must call it."""
    gather: Any = jax.jit(_identity, out_shardings=NamedSharding(mesh, P()))
    return jax.tree.map(lambda x: x.addressable_data(0), gather(params))


def on_host(params: Params, mesh: Mesh) -> Params:
    """Complete parameters as numpy arrays, gathered one by one. Every process must call it."""
    gather: Any = jax.jit(_identity, out_shardings=NamedSharding(mesh, P()))
    return jax.tree.map(lambda x: np.asarray(gather(x).addressable_data(0)), params)


def _identity(tree: Params) -> Params:
    return tree
