"""Where training images come from: the config of a dataset, which opens it.

A new dataset is a source (`data.records.ImageSource`) in a file of its own, and its name here. A
source that need not have a name is opened by a subclass of DataConfig beside it
(docs/extending.md).
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from bitdance_jax.config import AugmentConfig
from bitdance_jax.config.plain import BatchSize, Config, PathName, Range, require
from bitdance_jax.data.emoji import EmojiSource
from bitdance_jax.data.imagenet_tar import ImagenetTarSource
from bitdance_jax.data.records import ImageSource, Split, select
from bitdance_jax.data.sources import FolderSource, class_folders
from bitdance_jax.data.tfds import TfdsSource
from bitdance_jax.data.tokens import Manifest, TokensSource
from bitdance_jax.data.unlabelled import CLASS_NAMES, UnlabelledSource, UnlabelledTarSource
from bitdance_jax.errors import UserError


_PATHS = {
    "folder": "a folder with one sub-folder per class",
    "images": "a folder of images",
    "imagenet_tar": "ILSVRC2012_img_train.tar",
    "tokens": "a folder that `bitdance tokenize` wrote",
    "webdataset": "tar files of WebDataset, such as 'shard-{000..099}.tar'",
}
"""What `DataConfig.path` is, for the datasets that need it."""


@dataclass(frozen=True)
class DataConfig(Config):
    """Where training images come from.

    Attributes:
      source: "emoji" (embedded, 128px, 97 classes), "folder" (one sub-folder per class), "images"
        (a folder of images of any depth, without labels), "imagenet_tar" (the official training
        tar, read in place), "tfds" (a prepared TensorFlow Dataset), "webdataset" (the images of
        tar files, without labels), or "tokens" (made from one of these by `bitdance tokenize`).
      path: the folder, the tar or tars, or the folder of tokens; for "tfds" the folder of prepared
        datasets (None: the default of TFDS).
      dataset: for "tfds": its name.
      held_out: evaluation data: a folder or tar, or a folder of tokens, with the same classes; for
        "tfds" a split such as "validation". None: a fixed part of the training data is held out
        (`data.records.split_indices`).
      held_out_field: for "webdataset": a field of the samples' .json, such as "split", that tells
        which images are held out, as `CaptionedDataConfig.held_out_field`.
      batch_size: images per step.
      augment: see AugmentConfig.
      workers: loader processes; 0 loads in threads of the training process.
      cache_latents: for class-conditional training: run the tokenizer once over the images and
        store the tokens in the run's folder. Crops are then centre crops; a flip chooses between
        two stored versions.
    """

    source: Literal["emoji", "folder", "images", "imagenet_tar", "tfds", "tokens", "webdataset"] = (
        "emoji"
    )
    path: PathName | None = None
    dataset: str = "imagenet2012"
    held_out: PathName | None = None
    held_out_field: str | None = None
    batch_size: BatchSize = 32
    augment: AugmentConfig = AugmentConfig()
    workers: Annotated[int, Range(0, 1024)] = 0
    cache_latents: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not (self.cache_latents and self.source == "tokens"),
            "data.source tokens has no latents to cache; set data.cache_latents=False",
        )
        require(
            self.held_out_field is None or self.source == "webdataset",
            f"data.source {self.source} takes no data.held_out_field; webdataset does",
            "data.held_out_field",
        )
        require(
            self.held_out is None or self.held_out_field is None,
            "data.held_out and data.held_out_field exclude each other",
            "data.held_out",
        )
        if not self._is_named:
            return
        needed = _PATHS.get(self.source)
        require(
            needed is None or self.path is not None,
            f"data.source {self.source} needs data.path, {needed}",
        )
        for name in ("path", "held_out"):
            value = getattr(self, name)
            require(
                self.source != "emoji" or value is None,
                f"data.{name} {value} needs data.source too: folder, images, imagenet_tar, "
                "webdataset or tokens",
            )

    @property
    def gives_codes(self) -> bool:
        """Whether batches hold the tokenizer's bits, not images."""
        return self.cache_latents or self.source == "tokens"

    def open(self) -> ImageSource:
        """All records of `path`. A subclass may open a source of its own here.

        Raises:
          UserError: the data is missing or unreadable, or has another layout.
        """
        if self.source == "emoji":
            return EmojiSource()
        if self.source == "tfds":
            return TfdsSource(self.dataset, self.path, "train")
        assert self.path is not None  # Checked in __post_init__.
        if self.source == "folder":
            return FolderSource(self.path)
        if self.source == "images":
            return UnlabelledSource(self.path)
        if self.source == "imagenet_tar":
            return ImagenetTarSource(self.path)
        if self.source == "webdataset":
            return UnlabelledTarSource(self.path, self.held_out_field)
        return TokensSource(self.path)

    def open_held_out(self) -> ImageSource | None:
        """All records of `held_out`; None: part of `open()` is held out. Raises as `open`."""
        if self.held_out is None:
            return None
        if self.source == "tfds":
            return TfdsSource(self.dataset, self.path, self.held_out)
        if self.source == "tokens":
            return TokensSource(self.held_out)
        if self.source == "images":
            return UnlabelledSource(self.held_out)
        if self.source == "webdataset":
            return UnlabelledTarSource(self.held_out)
        is_tar = os.path.isfile(self.held_out)
        return ImagenetTarSource(self.held_out) if is_tar else FolderSource(self.held_out)

    def open_splits(self) -> tuple[ImageSource, ImageSource]:
        """Training records and held-out ones.

        Raises:
          UserError: as `open`; or the held-out data has other classes.
        """
        records = self.open()
        held_out = self.open_held_out()
        if held_out is None:
            return select(records, "train"), select(records, "heldout")
        if held_out.class_names != records.class_names:
            names = sorted(set(held_out.class_names) ^ set(records.class_names))
            raise UserError(
                f"the held-out data {self.held_out} has {len(held_out.class_names)} classes and "
                f"the training data {len(records.class_names)}, or in another order; the first "
                f"that only one of them has: {(names or ['none'])[0]}"
            )
        return records, held_out

    def open_split(self, split: Split) -> ImageSource:
        """One split; "all" is all of `open()`, held-out records included. Raises as
        `open_splits`."""
        if split == "heldout":
            return self.open_splits()[1]
        records = self.open()
        return records if split == "all" or self.held_out is not None else select(records, split)

    def count_classes(self) -> int | None:
        """Number of classes; None where only opening the data would tell. Raises as `open`."""
        if not self._is_named or self.source == "imagenet_tar":
            return None
        if self.source in ("images", "webdataset"):
            return len(CLASS_NAMES)
        if self.source == "tokens":
            assert self.path is not None  # Checked in __post_init__.
            return len(Manifest.read(self.path).class_names)
        if self.source == "folder":
            assert self.path is not None
            return len(class_folders(Path(self.path)))
        return len(self.open().class_names)

    @property
    def _is_named(self) -> bool:
        """Whether `source` names the dataset: not in a subclass that opens one of its own."""
        return type(self).open is DataConfig.open
