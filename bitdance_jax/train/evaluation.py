"""Looking at a run's EMA weights: figures on the held-out images, on the whole mesh, and the weights themselves in one place."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bitdance_jax.distributed.mesh import local_rows, put_batch
from bitdance_jax.train.step import make_evaluation_step
from bitdance_jax.train.task import Params, Task


MAX_IMAGES = 1000


class Evaluation:
    """What can be seen of the EMA weights.

    The figures are means over the first held-out images: full batches, at least one; where images are too few, some count twice.
    """

    def __init__(self, task: Task, frozen: Params, mesh: Mesh) -> None:
        """`frozen`: the task's, on the mesh."""
        self._task, self._frozen, self._mesh = task, frozen, mesh
        self._step = make_evaluation_step(task.objective, mesh)
        self._batches = task.held_out(local_rows(mesh, task.batch_size))
        self._start = self._batches.get_state()

    def figures(self, ema_params: Params) -> dict[str, float]:
        """Of the weights as they lie on the mesh; with noise that is the same at every call."""
        size = self._task.batch_size
        self._batches.set_state(self._start)
        figures = []
        for i in range(max(1, min(self._task.held_out_size, MAX_IMAGES) // size)):
            batch = put_batch(self._mesh, next(self._batches), size)
            figures.append(
                jax.device_get(self._step(ema_params, self._frozen, batch, jax.random.key(i)))
            )
        return {
            name: math.fsum(float(f[name]) for f in figures) / len(figures) for name in figures[0]
        }

    def images(self, ema_params: Params, step: int) -> dict[str, np.ndarray]:
        """What the task draws, on one device of process 0; elsewhere nothing. Every process has to call it."""
        whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(self._mesh, P()))(ema_params)
        if jax.process_index() != 0:
            return {}
        return self._task.preview(jax.tree.map(lambda x: x.addressable_data(0), whole), step)


def on_host(params: Params, mesh: Mesh) -> Params:
    """The whole parameters as numpy arrays, one after the other. Every process has to call it."""
    gather: Any = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
    return jax.tree.map(lambda x: np.asarray(gather(x).addressable_data(0)), params)
