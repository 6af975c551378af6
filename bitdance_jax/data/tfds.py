"""Images of a prepared TensorFlow Dataset, read from its array_record files without TensorFlow."""

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from bitdance_jax.data.captioned import (
    TEXT,
    CaptionedImage,
    Skips,
    require_captions,
    require_field,
)
from bitdance_jax.errors import UserError
from bitdance_jax.io.image_files import decode_image


class TfdsSource:
    """A split of a TFDS dataset with the features "image" and "label".

    Images are decoded as in all other sources, not by TFDS: the same image gives the same pixels,
    and a damaged one can be skipped. The labels of `imagenet2012` number the sorted WordNet ids, as
    in the other sources of ImageNet.

    Args:
      dataset: TFDS name, or "name:version" or "name/config".
      data_dir: folder of prepared datasets; None: TFDS_DATA_DIR, or ~/tensorflow_datasets.
      split: for example "train", "validation" or "train[:1%]".

    Raises:
      UserError: the package, the dataset or the split is missing, or the features are others.
    """

    def __init__(self, dataset: str, data_dir: str | os.PathLike[str] | None, split: str) -> None:
        source = _open_split(dataset, data_dir, split)
        self._name = f"{dataset}[{split}]"
        features = source.dataset_info.features
        if not {"image", "label"} <= set(features):
            raise UserError(
                f"{dataset} has the features {', '.join(features)}; it must have image and label"
            )
        self.class_names = tuple(features["label"].names)
        # The source itself cannot be pickled for worker processes: it has the dataset's builder.
        self._records = source.data_source
        self._features = features
        self._decoders = _raw_image()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._features.deserialize_example_np(
            self._records[index], decoders=self._decoders
        )
        return {
            "image": decode_image(io.BytesIO(example["image"]), f"{index} of {self._name}"),
            "label": example["label"],
        }


class CaptionedTfdsSource:
    """A split of a TFDS dataset with the feature "image" and captions.

    Args:
      name: "NAME" or "NAME@SPLIT", where NAME may have a version or a config; the split "train" is
        the default. Datasets are in TFDS_DATA_DIR, or ~/tensorflow_datasets.
      caption: feature of the captions, "captions/text" for one inside another; None: "text".
      split_field: a feature whose values become `splits`.

    Raises:
      UserError: the package, the dataset or the split is missing, or the features are others.
    """

    def __init__(
        self, name: str, caption: str | None = None, split_field: str | None = None
    ) -> None:
        dataset, _, split = name.partition("@")
        source = _open_split(dataset, os.environ.get("TFDS_DATA_DIR"), split or "train")
        features = source.dataset_info.features
        self.location = f"{dataset}[{split or 'train'}]"
        self.skipped = Skips()
        self.splits: Sequence[str] | None = None
        self._caption = (caption or TEXT).split("/")
        self._records = source.data_source
        self._features = features
        self._decoders = _raw_image()
        require_field(features, "image", self.location)
        feature: Any = features
        for part in self._caption:
            inner = getattr(feature, "feature", feature)  # That of a sequence.
            require_field(inner if hasattr(inner, "keys") else (), part, self.location)
            feature = inner[part]
        if split_field is not None:
            require_field(features, split_field, self.location)
            self.splits = [
                " ".join(_texts(self._read(index)[split_field])) for index in range(len(self))
            ]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> CaptionedImage:
        example = self._read(index)
        image = decode_image(io.BytesIO(example["image"]), f"{index} of {self.location}")
        return CaptionedImage(self._captions(example, index), image)

    def captions_of(self, index: int) -> tuple[str, ...]:
        return self._captions(self._read(index), index)

    def _captions(self, example: dict[str, Any], index: int) -> tuple[str, ...]:
        value: Any = example
        for part in self._caption:
            value = value[part]
        return require_captions(_texts(value), f"{index} of {self.location}")

    def _read(self, index: int) -> dict[str, Any]:
        return self._features.deserialize_example_np(self._records[index], decoders=self._decoders)


def _texts(value: Any) -> list[str]:
    """The texts of a feature, which are bytes."""
    values = np.asarray(value, object).ravel().tolist()
    return [
        entry.decode("utf-8", "replace") if isinstance(entry, bytes) else str(entry)
        for entry in values
    ]


def _raw_image() -> dict[str, Any]:
    """TFDS's decoders that leave images as they are in the files."""
    import tensorflow_datasets as tfds

    return {"image": tfds.decode.SkipDecoding()}


def _open_split(dataset: str, data_dir: str | os.PathLike[str] | None, split: str) -> Any:
    """A split of a prepared dataset. Raises a UserError; see the sources."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            "a TensorFlow Dataset needs another package: pip install 'bitdance_jax[datasets]'"
        ) from error
    try:
        return tfds.data_source(dataset, split=split, data_dir=data_dir, download=False)
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"TFDS knows no dataset {dataset!r}; see tensorflow.org/datasets, "
            "or set data.dataset='imagenet2012'"
        ) from error
    except (NotImplementedError, AssertionError, KeyError, OSError) as error:
        command = f"tfds build {dataset.split(':')[0]} --file_format=array_record"
        command += f" --data_dir={os.fspath(data_dir)}" if data_dir else ""
        raise UserError(
            f"{dataset} is not prepared as array_record files; run: {command}"
        ) from error
    except ValueError as error:
        raise UserError(
            f"cannot open the split {split!r} of {dataset}: {str(error).splitlines()[0]}"
        ) from error
