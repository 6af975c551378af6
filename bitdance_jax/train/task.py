"""What training needs to know of the thing it trains: an objective, which is pure, and a task, which has data and weights."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from bitdance_jax.io.model_lookup import RunRecord


Params = Any
"""Parameters: nested dicts of arrays."""
Batch = dict[str, Any]
"""A batch: name -> array; the first axis of every array is the batch's. Numpy from the loader, jax arrays inside an objective."""


@runtime_checkable
class Batches(Iterator[Batch], Protocol):
    """An endless iterator over batches that can be put back to any place it has been at (a grain iterator)."""

    def get_state(self) -> dict[str, Any]:
        """The place of the next batch, as JSON-ready data."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place that `get_state` gave, here or in an earlier process."""


@runtime_checkable
class Objective(Protocol):
    """What a training step computes: pure functions of arrays, traced inside jit. It needs neither data nor saved weights."""

    def init(self, key: jax.Array) -> Params:
        """Initial parameters, float32."""

    def loss(
        self, params: Params, frozen: Params, batch: Batch, keys: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The scalar loss, a mean over the batch's rows, and further scalar metrics.

        Args:
          params: what trains.
          frozen: weights that do not, as `abstract_frozen`.
          batch: as `abstract_batch`.
          keys: one for each row; all of a row's randomness comes from its own.
        """

    def evaluate(
        self, params: Params, frozen: Params, batch: Batch, keys: jax.Array
    ) -> dict[str, jax.Array]:
        """Scalar figures of a held-out batch."""

    def no_decay(self, path: tuple[str, ...]) -> bool:
        """Whether the parameter at `path` gets no weight decay, besides biases and the scales of norms."""

    def abstract_batch(self, batch_size: int) -> Batch:
        """Shapes and dtypes of a batch."""

    def abstract_frozen(self) -> Params:
        """Shapes and dtypes of the frozen weights."""

    def without_fused_kernels(self) -> "Objective":
        """The same computation, of operations that can be looked into and counted."""


@runtime_checkable
class Task(Protocol):
    """An objective with its data and frozen weights, and what comes out of a run.

    Attributes:
      frozen: weights that do not train, as `objective.abstract_frozen()`.
      batch_size: rows of a batch, over all processes.
      steps_per_epoch: steps in one pass over the training images, for the `epoch` column of the metrics.
      held_out_size: images kept back for evaluation.
    """

    frozen: Params
    batch_size: int
    steps_per_epoch: float
    held_out_size: int

    @property
    def record(self) -> RunRecord:
        """What the run's model folder will hold, but for weights and figures."""

    @property
    def objective(self) -> Objective:
        """What a step computes."""

    def batches(self, rows: np.ndarray) -> Batches:
        """The training batches from the start; of each only the given rows, this process's."""

    def held_out(self, rows: np.ndarray) -> Batches:
        """The held-out batches, likewise, in a fixed order that starts again after the last image."""

    def preview(self, ema_params: Params, step: int) -> dict[str, np.ndarray]:
        """Images to look at while it trains: name -> uint8 [H, W, 3]. The parameters lie whole on one local device."""

    def export(self, ema_params: Params, figures: dict[str, float], folder: str) -> None:
        """Writes the finished model folder; `figures` are the last held-out ones. The parameters are numpy arrays."""
