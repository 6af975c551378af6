"""The embedded emoji with their names as captions."""

from collections.abc import Sequence

import numpy as np

from bitdance_jax.data.captioned import CaptionedImage, Skips
from bitdance_jax.data.sources import EMOJI


class CaptionedEmojiSource:
    """1,906 images of 64 x 64 pixels, with captions such as "grinning face"."""

    location = "the embedded emoji"
    splits: Sequence[str] | None = None

    def __init__(self) -> None:
        self.skipped = Skips()
        with np.load(EMOJI) as file:
            self._images = file["images"]
            self._captions = tuple(map(str, file["captions"]))

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: int) -> CaptionedImage:
        return CaptionedImage((self._captions[index],), self._images[index])
