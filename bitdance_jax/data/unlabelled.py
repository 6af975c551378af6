"""Images without labels, in a folder or in tar files, for tokenizers."""

import io
import os
from collections import Counter
from typing import Any

import numpy as np

from bitdance_jax.data import listing
from bitdance_jax.data.records import Names
from bitdance_jax.data.split_fields import held_out_rows, read_splits
from bitdance_jax.data.tar_shards import Part, image_part, open_shards, read_member
from bitdance_jax.errors import FileError
from bitdance_jax.io.image_files import SUFFIXES, decode_image, load_image
from bitdance_jax.io.paths import local
from bitdance_jax.io.readers import reading


CLASS_NAMES = ("images",)
"""One name, the same for all data, so that other data may be held out."""


class UnlabelledSource:
    """All images below a folder, at any depth, sorted by path; each has label 0.

    Attributes:
      class_names: see CLASS_NAMES.
      skipped: number of files that are not images, by suffix.

    Raises:
      FileError: the folder is missing or unreadable, or contains no images.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        root = local(path)
        if not root.is_dir():
            raise FileError(f"no folder {root}; name one that contains images", root)
        with reading(root):
            paths, self.skipped = listing.list_images(root)
        if not paths:
            others = listing.describe_skipped(self.skipped)
            detail = f"; {others}" if others else ""
            raise FileError(
                f"the folder {root} contains no images ({', '.join(SUFFIXES)}){detail}", root
            )
        self.class_names: tuple[str, ...] = CLASS_NAMES
        self._paths = Names.of(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": load_image(self._paths[index]), "label": np.int32(0)}


class UnlabelledTarSource:
    """The images of WebDataset's tar files, one of each sample, in their order; each has label 0.

    Args:
      pattern: names the tars, see `tar_shards.expand`.
      split_field: a field of `KEY.json` that tells which images are held out, see `split_fields`;
        all of these files are read. None: the source does not say it.

    Attributes:
      class_names: see CLASS_NAMES.
      held_out: see ImageSource.
      skipped: number of members that are not images, by suffix.

    Raises:
      FileError: a tar is missing, truncated or damaged, or none has images.
      ConfigError: no image has the field, or it holds out none of them or all.
    """

    def __init__(self, pattern: str, split_field: str | None = None) -> None:
        self.class_names: tuple[str, ...] = CLASS_NAMES
        self.skipped: Counter[str] = Counter()
        shards = open_shards(pattern)
        self._files = [shard.file for shard in shards]
        names: list[str] = []
        places: list[tuple[int, int, int]] = []
        for number, shard in enumerate(shards):
            for key, parts in shard.samples.items():
                image = image_part(parts)
                self.skipped.update(f".{name}" for name in parts if not image or name != image[0])
                if image is not None:
                    names.append(f"{key}.{image[0]}")
                    places.append((number, *image[1]))
        if not places:
            others = listing.describe_skipped(self.skipped)
            detail = f"; {others}" if others else ""
            raise FileError(f"{pattern} contains no images{detail}", pattern)
        self._names = Names.of(names)
        self._places = np.array(places, np.int64)
        self.held_out: np.ndarray | None = None
        if split_field is not None:
            splits = read_splits(shards, self._places[:, 0], self._names, split_field)
            self.held_out = held_out_rows(splits, pattern)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, start, size = self._places[index].tolist()
        file = self._files[number]
        name = f"{file.path}/{self._names[index]}"
        data = read_member(file, Part(start, size), name)
        return {"image": decode_image(io.BytesIO(data), name), "label": np.int32(0)}
