"""A folder of images without labels, for tokenizers."""

import os
from typing import Any

import numpy as np

from bitdance_jax.data import listing
from bitdance_jax.data.records import Names, reading
from bitdance_jax.errors import FileError
from bitdance_jax.io.image_files import SUFFIXES, load_image
from bitdance_jax.io.paths import local


class UnlabelledSource:
    """All images below a folder, at any depth, sorted by path; each has label 0.

    Attributes:
      class_names: one name, the same for every folder, so that another may be held out.
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
        self.class_names: tuple[str, ...] = ("images",)
        self._paths = Names.of(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": load_image(self._paths[index]), "label": np.int32(0)}
