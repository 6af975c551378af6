"""Where records come from: random-access sources, as grain reads them.

Every HELD_OUT-th record of a source is kept back for evaluation: of 19 records in source order, the last. Both sources list a class's
pictures together, so the held-out ones spread over all classes; of the 1,906 emoji they are 100.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from bitdance_jax.config import DataConfig
from bitdance_jax.errors import UserError
from bitdance_jax.images import load_image


EMOJI = Path(__file__).parents[1] / "assets" / "emoji" / "noto_emoji_64.npz"
HELD_OUT = 19
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")

Split = Literal["train", "heldout", "all"]


@runtime_checkable
class PictureSource(Protocol):
    """A sequence of records: {"image": uint8 [H, W, 3] of any size, "label": int32}, or cached latents in place of the image.

    Attributes:
      class_names: name of each label.
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def split_indices(count: int, split: Split) -> np.ndarray:
    """Which of `count` records belong to a split, in order: every 19th is held out."""
    indices = np.arange(count)
    held_out = indices % HELD_OUT == HELD_OUT - 1
    return {"train": indices[~held_out], "heldout": indices[held_out], "all": indices}[split]


class ArraySource:
    """Records held in memory: record i is row i of every array (pictures and labels, or cached latents and labels)."""

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


class EmojiSource(ArraySource):
    """The embedded Noto Emoji: 64 x 64 pixels on white in 9 categories; 1,806 to train on and 100 held out."""

    def __init__(self, split: Split):
        with np.load(EMOJI) as file:
            rows = split_indices(len(file["labels"]), split)
            arrays = {"image": file["images"][rows], "label": file["labels"][rows]}
            super().__init__(arrays, tuple(map(str, file["categories"])))


class FolderSource:
    """A folder with one sub-folder a class, which holds the class's pictures at any depth.

    Labels number the sub-folders in sorted order; pictures are sorted by path. Hidden files and folders are passed over.

    Raises:
      UserError: the folder is missing, or its layout is another; or, when read, a picture is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], split: Split = "all"):
        root = Path(path)
        if not root.is_dir():
            raise UserError(f"no picture folder at {root}; give a folder with one sub-folder a class")
        entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
        stray = [entry.name for entry in entries if entry.suffix.lower() in SUFFIXES and entry.is_file()]
        if stray:
            raise UserError(f"{root / stray[0]} lies outside of any class; move it into a sub-folder of {root} named after its class")
        folders = [entry for entry in entries if entry.is_dir()]
        if not folders:
            raise UserError(f"{root} has no sub-folders; put the pictures of each class into a sub-folder of their own")
        pictures = [_pictures_below(folder) for folder in folders]
        for folder, files in zip(folders, pictures, strict=True):
            if not files:
                raise UserError(f"the class folder {folder} holds no pictures ({', '.join(SUFFIXES)}); fill or remove it")

        paths = [file for files in pictures for file in files]
        labels = np.repeat(np.arange(len(folders), dtype=np.int32), [len(files) for files in pictures])
        rows = split_indices(len(paths), split)
        if len(rows) == 0:
            raise UserError(f"{root} holds only {len(paths)} pictures; every {HELD_OUT}th is held out, so give at least {HELD_OUT}")
        self.class_names = tuple(folder.name for folder in folders)
        self._paths = [paths[row] for row in rows]
        self._labels = labels[rows]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": load_image(self._paths[index]), "label": self._labels[index]}


def open_source(config: DataConfig, split: Split) -> PictureSource:
    """The source that a config names."""
    if config.source == "emoji":
        return EmojiSource(split)
    assert config.path is not None  # checked by DataConfig
    return FolderSource(config.path, split)


def _pictures_below(folder: Path) -> list[str]:
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in files if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
    return sorted(found)
