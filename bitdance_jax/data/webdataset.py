"""Captioned images in tar files, as WebDataset writes them."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from bitdance_jax.data.captioned import (
    NO_CAPTION,
    NO_IMAGE,
    CaptionedImage,
    Skips,
    require_captions,
    require_field,
)
from bitdance_jax.data.records import Names
from bitdance_jax.data.split_fields import JSON, read_splits
from bitdance_jax.data.tar_shards import (
    Part,
    Shard,
    image_part,
    open_shards,
    read_member,
)
from bitdance_jax.errors import ConfigError, FileError
from bitdance_jax.io import readers
from bitdance_jax.io.image_files import DamagedImage, decode_image


TEXT = "txt"


class WebDatasetSource:
    """Samples of tar files, in their order: `KEY.jpg` (or .jpeg, .png, .webp) with `KEY.txt` or
    `KEY.json`, where a key is the path up to the first dot of the file's name.

    Opening it reads the headers of all tars; the index is kept in the user's cache folder.

    Args:
      pattern: names the tars, see `patterns.expand`.
      caption: field of the captions in `KEY.json`, a string or a list of strings; None: `KEY.txt`
        is the caption.
      split_field: a field of `KEY.json` whose values become `splits`; all of these files are read.

    Raises:
      FileError: a tar is missing, truncated or damaged, or none has a captioned image.
      ConfigError: there are no captions of this kind.
    """

    def __init__(
        self, pattern: str, caption: str | None = None, split_field: str | None = None
    ) -> None:
        self.location = pattern
        self.skipped = Skips()
        self.splits: Sequence[str] | None = None
        self._field = caption
        shards = open_shards(pattern)
        self._files = [shard.file for shard in shards]
        rows = self._rows(shards)
        if not rows:
            self._raise_empty(shards)
        self._shards = np.array([shard for shard, *_ in rows], np.int32)
        self._names = Names.of(name for _, name, *_ in rows)
        self._images = np.array([image for _, _, image, _ in rows], np.int64)
        self._captions = np.array([text for *_, text in rows], np.int64)
        if caption is not None:
            where = f"{self._files[self._shards[0]].path}/{self._names[0]}'s .json"
            with contextlib.suppress(DamagedImage):  # It says nothing about the others.
                require_field(self._json(0, self._captions), caption, where)
        if split_field is not None:
            self.splits = read_splits(shards, self._shards, self._names, split_field)

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> CaptionedImage:
        captions = self.captions_of(index)
        image = decode_image(io.BytesIO(self._read(index, self._images)), self._name(index))
        return CaptionedImage(captions, image)

    def captions_of(self, index: int) -> tuple[str, ...]:
        name = self._name(index)
        if self._field is None:
            value: Any = _decode_text(self._read(index, self._captions), f"{name}'s .txt")
        else:
            value = self._json(index, self._captions).get(self._field)
        return require_captions(value, name)

    def _name(self, index: int) -> str:
        return f"{self._files[self._shards[index]].path}/{self._names[index]}"

    def _rows(self, shards: list[Shard]) -> list[tuple[int, str, Part, Part]]:
        """Shard, image's name, its place, and the caption's, of each captioned image."""
        extension = TEXT if self._field is None else JSON
        rows = []
        for number, shard in enumerate(shards):
            for key, parts in shard.samples.items():
                image = image_part(parts)
                caption = parts.get(extension)
                if image is None and caption is not None:
                    self.skipped.add(NO_IMAGE, f"{shard.file.path}/{key}.{extension}")
                elif image is not None and (caption is None or caption.size == 0):
                    self.skipped.add(NO_CAPTION, f"{shard.file.path}/{key}.{image[0]}")
                elif image is not None and caption is not None:
                    rows.append((number, f"{key}.{image[0]}", image[1], caption))
        return rows

    def _raise_empty(self, shards: list[Shard]) -> None:
        """Raises the error about tars without a captioned image."""
        reason = f"; {self.skipped}" if str(self.skipped) else ""
        for shard in shards:
            for key, parts in shard.samples.items():
                if self._field is None and image_part(parts) and JSON in parts:
                    where = f"{shard.file.path}/{key}.json"
                    fields = _decode_json(shard.file.read(*parts[JSON]), where)
                    names = ", ".join(sorted(fields)) or "none"
                    raise ConfigError(
                        f"{self.location} has no .txt captions; data.captions names a field of"
                        f" its .json instead, which are: {names}",
                        "data.captions",
                    )
        kind = TEXT if self._field is None else JSON
        raise FileError(
            f"{self.location} has no captioned images: .jpg, .jpeg, .png or .webp with"
            f" .{kind} of the same name{reason}",
            self.location,
        )

    def _read(self, index: int, places: np.ndarray) -> bytes:
        file = self._files[self._shards[index]]
        return read_member(file, Part(*places[index].tolist()), self._name(index))

    def _json(self, index: int, places: np.ndarray) -> dict[str, Any]:
        where = f"{self._name(index)}'s .json"
        return _decode_json(self._read(index, places), where)


def _decode_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object of a sample. Raises a DamagedImage if it is none."""
    try:
        return readers.decode_json(data, where=where)
    except FileError as error:
        raise DamagedImage(str(error), where) from error


def _decode_text(data: bytes, where: str) -> str:
    """The caption of a sample. Raises a DamagedImage if it is no text."""
    try:
        return readers.decode_text(data, where)
    except FileError as error:
        raise DamagedImage(str(error), where) from error
