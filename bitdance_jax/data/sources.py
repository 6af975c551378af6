"""Sources of image records: arrays and folders."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bitdance_jax.data import listing
from bitdance_jax.data.records import ImageSource, Names
from bitdance_jax.errors import FileError
from bitdance_jax.io.image_files import SUFFIXES, load_image
from bitdance_jax.io.paths import check_path
from bitdance_jax.io.readers import reading


class ArraySource:
    """Records in memory: record i is row i of every array, for example of images and labels."""

    def __init__(self, arrays: Mapping[str, np.ndarray], class_names: tuple[str, ...]):
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"arrays must have the same number of rows, got {lengths}")
        self.arrays = dict(arrays)
        self.class_names = class_names

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: array[index] for name, array in self.arrays.items()}


class FolderSource:
    """A folder with one sub-folder per class, with images at any depth: torchvision's ImageFolder.

    Labels number the sub-folders in sorted order; images are sorted by path
    (`listing.list_images`). The tree is listed once, without accessing the files.

    Attributes:
      skipped: numbers of files that are no images, by their ending.

    Raises:
      FileError: the folder is missing or unreadable, or has another layout.
    """

    def __init__(self, path: str | os.PathLike[str]):
        root = Path(path)
        self.class_names = class_folders(root)
        self.skipped: Counter[str] = Counter()
        paths: list[str] = []
        counts = []
        with reading(root):
            # For large trees on slow disks.
            for name in tqdm(
                self.class_names, desc=f"listing {root}", unit="class", delay=2, dynamic_ncols=True
            ):
                images, skipped = listing.list_images(root / name)
                if not images:
                    others = f"; {text}" if (text := listing.describe_skipped(skipped)) else ""
                    raise FileError(
                        f"the class folder {root / name} holds no images ({', '.join(SUFFIXES)})"
                        f"{others}; fill or remove it",
                        root / name,
                    )
                paths += images
                self.skipped += skipped
                counts.append(len(images))
        self._paths = Names.of(paths)
        self._labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": load_image(self._paths[index]), "label": self._labels[index]}


def summary(train: ImageSource, held_out: ImageSource | None = None) -> str:
    """A line about the numbers of records, classes, held-out records and skipped files."""
    what = f"{len(train):,} images in {len(train.class_names):,} classes"
    if held_out is not None:
        what += f" to train on, {len(held_out):,} held out"
    skipped: Counter[str] = Counter()
    # Two splits of one source have the same dict.
    dicts = [getattr(source, "skipped", {}) for source in (train, held_out)]
    for counts in {id(counts): counts for counts in dicts}.values():
        skipped += Counter(counts)
    return f"{what}; {listing.describe_skipped(skipped)}".removesuffix("; ")


def class_folders(root: Path) -> tuple[str, ...]:
    """Names of the sub-folders, sorted."""
    check_path(root)
    if not root.is_dir():
        raise FileError(
            f"no image folder at {root}; use a folder with one sub-folder per class", root
        )
    with reading(root), os.scandir(root) as entries:
        visible = sorted(
            (entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")
        )
    stray = [name for name, is_folder in visible if not is_folder and listing.is_image(name)]
    if stray:
        raise FileError(
            f"{root / stray[0]} is in no class folder; move it to a sub-folder of {root} "
            "named after its class",
            root / stray[0],
        )
    folders = tuple(name for name, is_folder in visible if is_folder)
    if not folders:
        raise FileError(
            f"{root} has no sub-folders; move the images of each class to one of their own",
            root,
        )
    return folders
