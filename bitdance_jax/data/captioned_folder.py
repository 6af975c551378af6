"""A folder of captioned images: with `metadata.jsonl`, or with a text file beside each image."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bitdance_jax.data import listing
from bitdance_jax.data.captioned import (
    NO_CAPTION,
    NO_IMAGE,
    TEXT,
    CaptionedImage,
    Skips,
    clean_captions,
    require_captions,
    require_field,
)
from bitdance_jax.data.records import Names
from bitdance_jax.errors import FileError
from bitdance_jax.io import readers
from bitdance_jax.io.image_files import SUFFIXES, DamagedImage, load_image
from bitdance_jax.io.paths import local
from bitdance_jax.io.readers import reading


METADATA = "metadata.jsonl"
FILE_NAME = "file_name"
MAX_METADATA_BYTES = 2**31
MAX_CAPTION_BYTES = 2**20


class CaptionedFolderSource:
    """Images below a folder, at any depth, sorted by path.

    If there are files named `metadata.jsonl`, in the folder itself or in sub-folders, they name the
    images, as in Hugging Face's ImageFolder: one JSON object a line, with the image's path relative
    to the file (`file_name`) and its caption, or a list of captions. Otherwise `NAME.txt` beside
    `NAME.png` is the image's one caption, whatever its lines.

    Args:
      path: the folder.
      caption: field of the captions in `metadata.jsonl`; None: "text".
      split_field: a field whose values become `splits`.

    Raises:
      FileError: the folder is missing or unreadable, or has no captioned images.
      ConfigError: the metadata has no such field.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        caption: str | None = None,
        split_field: str | None = None,
    ) -> None:
        root = local(path)
        if not root.is_dir():
            raise FileError(f"no folder {root}; name one with captioned images", root)
        with reading(root):
            images, others = _list_files(root)
        self.location = str(root)
        self.skipped = Skips()
        self.splits: Sequence[str] | None = None
        metadata = [file for file in others if os.path.basename(file) == METADATA]
        self._captions: Names | None = None
        if metadata:
            found = self._from_metadata(metadata, images, caption or TEXT, split_field)
        else:
            if caption is not None or split_field is not None:
                raise FileError(
                    f"{root} has no {METADATA} with the field {caption or split_field!r}; its"
                    " captions would be NAME.txt beside each image",
                    root,
                )
            found = self._beside(images, others)
        if not found:
            reason = str(self.skipped)
            raise FileError(
                f"{root} has no captioned images: neither {METADATA} nor NAME.txt beside images"
                f" ({', '.join(SUFFIXES)}){'; ' if reason else ''}{reason}",
                root,
            )
        self._paths = Names.of(found)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> CaptionedImage:
        return CaptionedImage(self.captions_of(index), load_image(self._paths[index]))

    def captions_of(self, index: int) -> tuple[str, ...]:
        if self._captions is not None:
            return tuple(json.loads(self._captions[index]))
        path = self._paths[index]
        return require_captions(_read_caption(path), path)

    def _beside(self, images: list[str], others: list[str]) -> list[str]:
        texts = {os.path.splitext(file)[0] for file in others if file.endswith(".txt")}
        found = []
        for path in images:
            stem = os.path.splitext(path)[0]
            if stem in texts:
                found.append(path)
            else:
                self.skipped.add(NO_CAPTION, path)
        for stem in sorted(texts - {os.path.splitext(path)[0] for path in found}):
            self.skipped.add(NO_IMAGE, f"{stem}.txt")
        return found

    def _from_metadata(
        self, files: list[str], images: list[str], caption: str, split_field: str | None
    ) -> list[str]:
        existing = set(images)
        rows: dict[str, tuple[str, str]] = {}
        for file in files:
            for line, record in read_json_lines(file):
                where = f"line {line} of {file}"
                require_field(record, FILE_NAME, where)
                require_field(record, caption, where)
                if split_field is not None:
                    require_field(record, split_field, where)
                path = os.path.normpath(os.path.join(os.path.dirname(file), str(record[FILE_NAME])))
                captions = clean_captions(record[caption])
                if path not in existing:
                    self.skipped.add(NO_IMAGE, path)
                elif not captions:
                    self.skipped.add(NO_CAPTION, path)
                else:
                    split = "" if split_field is None else str(record[split_field])
                    rows[path] = json.dumps(captions), split
        for path in images:
            if path not in rows:
                self.skipped.add(NO_CAPTION, path)
        found = sorted(rows)
        self._captions = Names.of(rows[path][0] for path in found)
        if split_field is not None:
            self.splits = [rows[path][1] for path in found]
        return found


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number and the JSON object of each line that is not empty.

    Raises:
      FileError: the file cannot be read, or a line is no JSON object.
    """
    text = readers.read_text(path, MAX_METADATA_BYTES)
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, readers.decode_json(line, where=f"line {number} of {path}")


def _list_files(root: Path) -> tuple[list[str], list[str]]:
    """The sorted paths of images, and those of other files, below a folder."""
    others: list[str] = []
    images, _ = listing.list_images(root, others)
    return [os.path.normpath(path) for path in images], [os.path.normpath(path) for path in others]


def _read_caption(image: str) -> str:
    path = f"{os.path.splitext(image)[0]}.txt"
    try:
        return readers.read_text(path, MAX_CAPTION_BYTES)
    except FileError as error:
        raise DamagedImage(str(error), path) from error
