"""What the training loop needs to know of the thing it trains."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np


Params = Any
"""Parameters: nested dicts of float32 arrays."""
Batch = dict[str, Any]
"""A batch: name -> array; the first axis of every array is the batch's. Numpy from the loader, jax arrays inside `Task.loss`."""


@runtime_checkable
class Batches(Iterator[Batch], Protocol):
    """An endless iterator over batches that can be put back to any place it has been at (a grain iterator)."""

    def get_state(self) -> dict[str, Any]:
        """The place of the next batch, as JSON-ready data."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place that `get_state` gave, here or in an earlier process."""


@runtime_checkable
class Task(Protocol):
    """What is trained.

    Attributes:
      steps_per_epoch: steps in one pass over the training pictures, for the `epoch` column of the metrics.
    """

    steps_per_epoch: float

    def init(self, key: jax.Array) -> Params:
        """Initial parameters, float32. Called inside jit."""

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The scalar loss and further scalar metrics. Pure; jitted as part of the train step."""

    def no_decay(self, path: tuple[str, ...]) -> bool:
        """Whether the parameter at `path` gets no weight decay, besides those with fewer than two dimensions."""

    def stacked_axes(self, path: tuple[str, ...]) -> int:
        """How many leading axes of the parameter at `path` come from stacking layers: they do not count as dimensions for weight decay."""

    def preview(self, ema_params: Params, step: int) -> dict[str, np.ndarray]:
        """Pictures to look at while it trains: name -> uint8 [H, W, 3]."""

    def evaluate(self, ema_params: Params) -> dict[str, float]:
        """Figures on the held-out split, logged with the previews."""

    def export(self, ema_params: Params, folder: str) -> None:
        """Writes the finished model folder."""

    def batches(self) -> Batches:
        """The training batches from the start."""
