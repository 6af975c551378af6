"""The embedded images: 3,127 Fluent emoji with captions, classes and a held-out part."""

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from bitdance_jax.data.captioned import CaptionedImage, Skips
from bitdance_jax.data.records import Split, select
from bitdance_jax.data.split_fields import held_out_rows
from bitdance_jax.data.transforms import centre_crop
from bitdance_jax.io.image_files import decode_image


ARCHIVE = Path(__file__).parents[1] / "assets" / "emoji" / "fluent_emoji_128.zip"
"""Images and a metadata.jsonl: unpacked, a folder of captioned images."""

LOCATION = "the embedded emoji"
"""Names the images in messages."""

SIDE = 128
"""Height and width of the images in pixels."""

EXAMPLES = (
    "grinning face",
    "woman astronaut, dark skin tone",
    "man firefighter, medium skin tone",
    "woman superhero, medium-dark skin tone",
    "person surfing, medium-dark skin tone",
    "Santa Claus, medium skin tone",
    "thumbs up, light skin tone",
    "red heart",
)
"""Some of the captions, to show what the embedded model does; the firefighter is held out."""


class EmojiArchive:
    """The images as files in memory, in the order of Unicode.

    Attributes:
      records: file name, caption ("text"), "group", "subgroup" and "split" of each image.
      splits: the last of these.
      held_out: whether an image is held out. The 99 that are have combinations of a name and a
        skin tone that no other image has, while others have the name, and the skin tone.
    """

    def __init__(self) -> None:
        with zipfile.ZipFile(ARCHIVE) as archive:
            lines = archive.read("metadata.jsonl").splitlines()
            self.records = [json.loads(line) for line in lines]
            self._files = [archive.read(record["file_name"]) for record in self.records]
        self.splits = [record["split"] for record in self.records]
        self.held_out = held_out_rows(self.splits, LOCATION)

    def image(self, index: int) -> UInt8[np.ndarray, "H W 3"]:
        """An image on white."""
        return decode_image(io.BytesIO(self._files[index]), self.records[index]["file_name"])


class EmojiSource:
    """The embedded images with their subgroups of Unicode, of which there are 97, as classes."""

    def __init__(self) -> None:
        self._archive = EmojiArchive()
        names = [record["subgroup"] for record in self._archive.records]
        self.class_names = tuple(sorted(set(names)))
        self.held_out = self._archive.held_out
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self._labels = np.array([numbers[name] for name in names], np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._archive.image(index), "label": self._labels[index]}


class CaptionedEmojiSource:
    """The embedded images with their names as captions: "woman astronaut, dark skin tone".

    Attributes:
      captions: of all images.
      held_out: whether an image is held out.
    """

    location = LOCATION

    def __init__(self) -> None:
        self.skipped = Skips()
        self._archive = EmojiArchive()
        self.captions: list[str] = [record["text"] for record in self._archive.records]
        self.held_out = self._archive.held_out
        self.splits: Sequence[str] | None = self._archive.splits

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> CaptionedImage:
        return CaptionedImage(self.captions_of(index), self._archive.image(index))

    def captions_of(self, index: int) -> tuple[str, ...]:
        return (self.captions[index],)


def emoji_images(split: Split, size: int = SIDE) -> UInt8[np.ndarray, "B H W 3"]:
    """The embedded images of a split, at a height and width of `size` pixels."""
    source = select(EmojiSource(), split)
    records = (source[index] for index in range(len(source)))
    return np.stack([centre_crop(record["image"], size) for record in records])
