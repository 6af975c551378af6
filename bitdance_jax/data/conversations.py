"""Conversations about images: a jsonl file of turns with `<image>` where an image is read."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8


IMAGE = "<image>"
"""Stands for the next image in a turn's text."""

Role = Literal["user", "assistant"]


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
      turns: the first is the user's, then they alternate; the last is the assistant's.
    """

    images: tuple[UInt8[np.ndarray, "H W 3"], ...]
    turns: tuple[Turn, ...]
