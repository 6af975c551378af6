"""What the tasks share: batches of training and held-out records, and the model folder of a run."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from bitdance_jax.data.config import DataConfig
from bitdance_jax.data.crop_sizes import CropSizes
from bitdance_jax.data.loader import make_loader
from bitdance_jax.data.records import ImageSource
from bitdance_jax.data.sources import summary
from bitdance_jax.io import model_folder
from bitdance_jax.io.model_lookup import RunRecord
from bitdance_jax.io.progress import report
from bitdance_jax.train.task import Batch, Batches, Params


@dataclass(frozen=True)
class TaskData:
    """The training and held-out records of a task, and their batches.

    Attributes:
      config: batch size, augmentation and loader processes.
      seed: of the order and the augmentation.
      image_size: in pixels; ignored for tokens.
      crop_sizes: of the training crops, if they are not all of `image_size`.
      train: training records.
      held_out: held-out records.
    """

    config: DataConfig
    seed: int
    image_size: int
    train: ImageSource
    held_out: ImageSource
    crop_sizes: CropSizes | None = None

    def train_batches(self, rows: np.ndarray) -> Batches:
        """Shuffled and augmented training batches, of each only the given rows."""
        return make_loader(
            self.train,
            batch_size=self.config.batch_size,
            rows=rows,
            seed=self.seed,
            image_size=self.crop_sizes or self.image_size,
            augment=self.config.augment,
            workers=self.config.workers,
        )

    def held_out_batches(self, batch_size: int, rows: np.ndarray | None = None) -> Batches:
        """Held-out batches in order, of each only the given rows; None: all."""
        return make_loader(
            self.held_out,
            batch_size=batch_size,
            rows=rows,
            seed=0,
            image_size=self.image_size,
            shuffle=False,
        )


class ImageTask:
    """Base of tasks that train on `TaskData`.

    Attributes:
      batch_size, steps_per_epoch, held_out_size: as in `train.task.Task`.
    """

    steps_per_epoch: float | None
    previews_on_mesh = False

    def __init__(self, data: TaskData) -> None:
        self._data = data
        self.batch_size = data.config.batch_size
        self.steps_per_epoch = len(data.train) / self.batch_size
        self.held_out_size = len(data.held_out)

    def batches(self, rows: np.ndarray) -> Batches:
        return self._data.train_batches(rows)

    def held_out(self, rows: np.ndarray) -> Batches:
        return self._data.held_out_batches(self.batch_size, rows)


def open_splits(data: DataConfig) -> tuple[ImageSource, ImageSource]:
    """Training and held-out records; reports their numbers, before anything is computed from
    them."""
    train, held_out = data.open_splits()
    report(summary(train, held_out))
    return train, held_out


def abstract_images(batch_size: int, size: int) -> Batch:
    """Shapes and dtypes of a batch of labelled images."""
    return {
        "image": jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }


def save_model(
    folder: str,
    record: RunRecord,
    params: Params,
    *,
    step: int,
    metrics: dict[str, float],
    dtype: str,
) -> None:
    """Writes the model folder of a run, with the record's files.

    Args:
      folder: to be written, or replaced.
      record: kind, config and metadata of the model.
      params: its weights.
      step: number of steps trained.
      metrics: of the held-out records.
      dtype: of the stored weights.
    """
    model_folder.save(
        folder,
        kind=record.kind,
        config=record.config,
        params=jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), params),
        metadata={"steps": step, **record.metadata, "held_out": metrics},
        files=record.files,
        force=True,
    )
