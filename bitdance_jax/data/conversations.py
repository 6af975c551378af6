"""Conversations about images: a jsonl file of turns with `<image>` where an image is read."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from bitdance_jax.data.buckets import Buckets, cover_crop
from bitdance_jax.data.captioned import Skips
from bitdance_jax.data.captioned_folder import read_json_lines
from bitdance_jax.data.loader import next_undamaged
from bitdance_jax.data.proportions import Shuffled
from bitdance_jax.data.records import Names
from bitdance_jax.errors import FileError
from bitdance_jax.io.image_files import load_image


IMAGE = "<image>"
"""Stands for the next image in a turn's text."""

Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}

ANOTHER_FORM = "conversations of another form"
OTHER_COUNT = "conversations with more or fewer images than <image>"
EMPTY = "conversations with an empty turn"


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
      role: who says it.
      text: with IMAGE where an image is read, or, in a turn of the assistant, drawn.
    """

    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """Turns of user and assistant, with images.

    Attributes:
      images: RGB, in the order of the placeholders; as many as there are in all turns.
      turns: the first is the user's, or before it the system's; then user and assistant alternate;
        the last is the assistant's.
    """

    images: tuple[UInt8[np.ndarray, "_ _ 3"], ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class ConversationSample:
    """A conversation as the model is trained on it.

    Attributes:
      record: its images have the sizes of buckets.
      source: location of the source.
      skipped: a message about each damaged record that this one replaces.
    """

    record: Conversation
    source: str
    skipped: tuple[str, ...] = ()


class ConversationSource:
    """Conversations in a jsonl file, one JSON object a line, in the form of LLaVA's data:

        {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                             {"from": "gpt", "value": "A cat."}]}

    "image" is a path or a list of paths, relative to the image folder; it is missing where nothing
    is shown. "from" is human or user, and gpt or assistant; the first turn may be system's. Where
    there is one image and no `<image>`, the image comes first.

    Args:
      path: of the file.
      image_folder: None: the file's folder.

    Attributes:
      location: the path.
      skipped: conversations that cannot be used, by reason.

    Raises:
      FileError: the file cannot be read, or has no conversations that can be used.
    """

    def __init__(
        self, path: str | os.PathLike[str], image_folder: str | os.PathLike[str] | None = None
    ) -> None:
        self.location = os.fspath(path)
        self.skipped = Skips()
        self._folder = Path(path).parent if image_folder is None else Path(image_folder)
        records = []
        for line, record in read_json_lines(path):
            reason = _reason_to_skip(record)
            if reason:
                self.skipped.add(reason, f"line {line}")
            else:
                used = {name: record[name] for name in ("image", "conversations") if name in record}
                records.append(json.dumps(used))
        if not records:
            reason = str(self.skipped) or "it is empty"
            raise FileError(f"{path} has no conversations that can be used: {reason}", path)
        self._records = Names.of(records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Conversation:
        """Raises a DamagedImage if one of its images cannot be read."""
        record = json.loads(self._records[index])
        turns = _turns(record)
        paths = _image_names(record)
        if paths and not any(IMAGE in turn.text for turn in turns):
            first = next(number for number, turn in enumerate(turns) if turn.role == "user")
            turns[first] = Turn("user", f"{IMAGE}\n{turns[first].text}")
        images = tuple(load_image(self._folder / path) for path in paths)
        return Conversation(images, tuple(turns))


class ConversationMixture:
    """An endless sequence of conversations: number n is a function of the sources, the seed and n.

    Args:
      sources: what is drawn from.
      seed: of the order.
      resolution: of the images, see Buckets.
      size_multiple: see Buckets.
      weights: of the sources; None: their numbers of conversations.

    Raises:
      ConfigError: the resolution is no multiple of `size_multiple`.
    """

    def __init__(
        self,
        sources: Sequence[ConversationSource],
        *,
        seed: int,
        resolution: int,
        size_multiple: int,
        weights: Sequence[int | float] | None = None,
    ) -> None:
        self.sources = tuple(sources)
        self._buckets = Buckets(resolution, size_multiple)
        self._order = Shuffled([len(source) for source in sources], weights, seed)

    def draw(self, n: int) -> ConversationSample:
        """Sample n; if it is damaged, the next undamaged one of its source replaces it.

        Raises:
          FileError: too many in a row are damaged, or the source cannot be read.
        """
        drawn = self._order[n]
        source = self.sources[drawn.source]
        record, skipped = next_undamaged(source.__getitem__, drawn.index, len(source))
        images = tuple(
            cover_crop(image, self._buckets.nearest(image.shape[0], image.shape[1]))
            for image in record.images
        )
        return ConversationSample(replace(record, images=images), source.location, skipped)


def _reason_to_skip(record: dict[str, Any]) -> str | None:
    """Why a record of the file cannot be used, if so."""
    turns = record.get("conversations")
    images = record.get("image", [])
    if not isinstance(turns, list) or not isinstance(images, str | list):
        return ANOTHER_FORM
    if not all(isinstance(turn, dict) for turn in turns):
        return ANOTHER_FORM
    if not all(isinstance(turn.get(name), str) for turn in turns for name in ("from", "value")):
        return ANOTHER_FORM
    if not all(turn["from"] in _ROLES for turn in turns):
        return ANOTHER_FORM
    if not all(isinstance(name, str) for name in _image_names(record)):
        return ANOTHER_FORM
    parsed = _turns(record)
    roles = [turn.role for turn in parsed]
    if roles[:1] == ["system"]:
        if IMAGE in parsed[0].text:
            return ANOTHER_FORM
        roles = roles[1:]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        return ANOTHER_FORM
    if not all(turn.text for turn in parsed):
        return EMPTY
    count = len(_image_names(record))
    placeholders = sum(turn.text.count(IMAGE) for turn in parsed)
    if placeholders != count and (count, placeholders) != (1, 0):
        return OTHER_COUNT
    return None


def _turns(record: dict[str, Any]) -> list[Turn]:
    return [Turn(_ROLES[turn["from"]], turn["value"].strip()) for turn in record["conversations"]]


def _image_names(record: dict[str, Any]) -> list[str]:
    images = record.get("image", [])
    return [images] if isinstance(images, str) else images
