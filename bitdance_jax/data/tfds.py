"""Images of a prepared TensorFlow Dataset, read from its array_record files without TensorFlow."""

import io
import os
from typing import Any

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
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(
                "data.source tfds needs another package: pip install 'bitdance_jax[datasets]'"
            ) from error
        self._name = f"{dataset}[{split}]"
        try:
            source = tfds.data_source(dataset, split=split, data_dir=data_dir, download=False)
        except tfds.core.DatasetNotFoundError as error:
            raise UserError(
                f"TFDS knows no dataset {dataset!r}; see tensorflow.org/datasets, "
                "or set data.dataset='imagenet2012'"
            ) from error
        except (NotImplementedError, AssertionError, OSError) as error:
            command = f"tfds build {dataset.split(':')[0]} --file_format=array_record"
            command += f" --data_dir={os.fspath(data_dir)}" if data_dir else ""
            raise UserError(
                f"{dataset} is not prepared as array_record files; run: {command}"
            ) from error
        except ValueError as error:
            raise UserError(
                f"cannot open the split {split!r} of {dataset}: {str(error).splitlines()[0]}"
            ) from error
        features = source.dataset_info.features
        if not {"image", "label"} <= set(features):
            raise UserError(
                f"{dataset} has the features {', '.join(features)}; it must have image and label"
            )
        self.class_names = tuple(features["label"].names)
        # The source itself cannot be pickled for worker processes: it has the dataset's builder.
        self._records = source.data_source
        self._features = features
        self._decoders = {"image": tfds.decode.SkipDecoding()}

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
