"""Where records come from: random-access sources, as grain reads them."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bitdance_jax.config import DataConfig
from bitdance_jax.data import listing
from bitdance_jax.data.imagenet_tar import ImagenetTarSource
from bitdance_jax.data.records import ImageSource, Names, Split, reading, select, split_indices
from bitdance_jax.data.tfds import TfdsSource
from bitdance_jax.data.tokens import Manifest, TokensSource
from bitdance_jax.errors import UserError
from bitdance_jax.io.image_files import SUFFIXES, load_image


EMOJI = Path(__file__).parents[1] / "assets" / "emoji" / "noto_emoji_64.npz"


class ArraySource:
    """Records held in memory: record i is row i of every array (images and labels, for example)."""

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
    """A folder with one sub-folder a class, which holds the class's images at any depth: the layout of torchvision's ImageFolder.

    Labels number the sub-folders in sorted order; images are sorted by path (`listing.list_images`). The tree is listed once,
    without a look at the files themselves.

    Attributes:
      left_out: how many files are no images, by their ending.

    Raises:
      UserError: the folder is missing or unreadable, or its layout is another.
    """

    def __init__(self, path: str | os.PathLike[str]):
        root = Path(path)
        self.class_names = _class_folders(root)
        self.left_out: Counter[str] = Counter()
        paths: list[str] = []
        counts = []
        with reading(root):
            # The bar is for large trees on slow disks.
            for name in tqdm(
                self.class_names, desc=f"listing {root}", unit="class", delay=2, dynamic_ncols=True
            ):
                images, left_out = listing.list_images(root / name)
                if not images:
                    others = f"; {text}" if (text := listing.left_out_text(left_out)) else ""
                    raise UserError(
                        f"the class folder {root / name} holds no images ({', '.join(SUFFIXES)}){others}; fill or remove it"
                    )
                paths += images
                self.left_out += left_out
                counts.append(len(images))
        self._paths = Names.of(paths)
        self._labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": load_image(self._paths[index]), "label": self._labels[index]}


def open_source(config: DataConfig, split: Split) -> ImageSource:
    """One split of the source that a config names; for both, `open_sources` opens what they share once.

    "all" is the whole of `config.path`. Where `config.held_out` is given, "train" is that too, and "heldout" the whole of the other;
    otherwise see `split_indices`.

    Raises:
      UserError: the data is missing, unreadable or laid out in another way; or the held-out data has other classes.
    """
    if config.source == "emoji":
        return EmojiSource(split)
    if config.held_out is None:
        return select(_open(config), split)
    if split != "heldout":
        return _open(config)
    return open_sources(config)[1]


def open_sources(config: DataConfig) -> tuple[ImageSource, ImageSource]:
    """Training records and held-out ones; see `open_source`."""
    if config.source == "emoji":
        return EmojiSource("train"), EmojiSource("heldout")
    whole = _open(config)
    if config.held_out is None:
        return select(whole, "train"), select(whole, "heldout")
    held_out = _open_held_out(config)
    if held_out.class_names != whole.class_names:
        names = sorted(set(held_out.class_names) ^ set(whole.class_names))
        raise UserError(
            f"the held-out data {config.held_out} has {len(held_out.class_names)} classes and the training data "
            f"{len(whole.class_names)}, or in another order; the first that only one of them has: {(names or ['none'])[0]}"
        )
    return whole, held_out


def count_classes(config: DataConfig) -> int | None:
    """Classes of a source; None where only opening it would tell."""
    if config.source == "emoji":
        return len(EmojiSource("heldout").class_names)
    if config.source == "tokens":
        assert config.path is not None  # checked by DataConfig
        return len(Manifest.read(config.path).class_names)
    if config.source == "folder":
        assert config.path is not None
        return len(_class_folders(Path(config.path)))
    return len(_open(config).class_names) if config.source == "tfds" else None


def summary(train: ImageSource, held_out: ImageSource | None = None) -> str:
    """One line for the user: how many records and classes, held out, and what was left out by its ending."""
    what = f"{len(train):,} images in {len(train.class_names):,} classes"
    if held_out is not None:
        what += f" to train on, {len(held_out):,} held out"
    left_out: Counter[str] = Counter()
    for found in {
        id(each): each for each in (getattr(source, "left_out", {}) for source in (train, held_out))
    }.values():
        left_out += Counter(found)
    return f"{what}; {listing.left_out_text(left_out)}".removesuffix("; ")


def _open(config: DataConfig) -> ImageSource:
    if config.source == "tfds":
        return TfdsSource(config.dataset, config.path, "train")
    assert config.path is not None  # checked by DataConfig
    if config.source == "folder":
        return FolderSource(config.path)
    return (
        ImagenetTarSource(config.path)
        if config.source == "imagenet_tar"
        else TokensSource(config.path)
    )


def _open_held_out(config: DataConfig) -> ImageSource:
    assert config.held_out is not None
    if config.source == "tfds":
        return TfdsSource(config.dataset, config.path, config.held_out)
    if config.source == "tokens":
        return TokensSource(config.held_out)
    return (
        ImagenetTarSource(config.held_out)
        if os.path.isfile(config.held_out)
        else FolderSource(config.held_out)
    )


def _class_folders(root: Path) -> tuple[str, ...]:
    """Names of the sub-folders, sorted."""
    if not root.is_dir():
        raise UserError(f"no image folder at {root}; give a folder with one sub-folder a class")
    with reading(root), os.scandir(root) as entries:
        visible = sorted(
            (entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")
        )
    stray = [name for name, is_folder in visible if not is_folder and listing.is_image(name)]
    if stray:
        raise UserError(
            f"{root / stray[0]} lies outside of any class; move it into a sub-folder of {root} named after its class"
        )
    folders = tuple(name for name, is_folder in visible if is_folder)
    if not folders:
        raise UserError(
            f"{root} has no sub-folders; put the images of each class into a sub-folder of their own"
        )
    return folders
