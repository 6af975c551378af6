"""How training images are cropped and flipped."""

from dataclasses import dataclass
from typing import Annotated, Literal

from bitdance_jax.config.plain import Config, NotNegative, Range, Share, require


@dataclass(frozen=True)
class AugmentConfig(Config):
    """Training augmentation (paper 4.2): ADM's random crops, replaced by centre crops late in
    training, and horizontal flips throughout.

    Attributes:
      min_crop: smallest side of a crop, as a share of the image's shorter side; 1: always the
        largest square.
      flip: probability of a horizontal flip, of random and of centre crops.
      small_images: whose shorter side is smaller than the crop: "enlarge" them, or "skip" them and
        take the next one; their number is reported.
      decay_start, decay_end: epochs between which the share of random crops falls from 1 to 0;
        None: never.
    """

    min_crop: Annotated[float, Range(0, 1, above=True)] = 0.8
    flip: Share = 0.5
    small_images: Literal["enlarge", "skip"] = "enlarge"
    decay_start: NotNegative | None = None
    decay_end: NotNegative | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.decay_start is None) == (self.decay_end is None),
            "decay_start and decay_end must be set together",
        )
        if self.decay_start is not None and self.decay_end is not None:
            require(self.decay_start <= self.decay_end, "decay_start must not be after decay_end")
