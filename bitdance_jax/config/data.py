"""Where training images come from, and how they are cropped."""

from dataclasses import dataclass
from typing import Annotated, Literal

from bitdance_jax.config.plain import (
    BatchSize,
    Config,
    NotNegative,
    PathName,
    Range,
    Share,
    require,
)


# What `DataConfig.path` is, for sources that need it.
_PATHS = {
    "folder": "a folder with one sub-folder a class",
    "imagenet_tar": "ILSVRC2012_img_train.tar",
    "tokens": "a folder that `python -m bitdance_jax.data.tokenize` wrote",
}


@dataclass(frozen=True)
class AugmentConfig(Config):
    """Training augmentation (paper 4.2): ADM's random resized crop, fading to centre crops, and a horizontal flip, which never fades.

    Attributes:
      min_crop: smallest share of the (resized) shorter side that a crop keeps; 1 means the largest square, always.
      flip: probability of a horizontal flip, of random and of centre crops.
      decay_start, decay_end: epochs between which the share of random crops falls from 1 to 0; None: never.
    """

    min_crop: Annotated[float, Range(0, 1, above=True)] = 0.8
    flip: Share = 0.5
    decay_start: NotNegative | None = None
    decay_end: NotNegative | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.decay_start is None) == (self.decay_end is None),
            "decay_start and decay_end go together",
        )
        if self.decay_start is not None and self.decay_end is not None:
            require(self.decay_start <= self.decay_end, "decay_start must not be after decay_end")


@dataclass(frozen=True)
class DataConfig(Config):
    """Where training images come from.

    Attributes:
      source: "emoji" (embedded, 64px, 9 categories), "folder" (one sub-folder a class), "imagenet_tar" (the official training tar, read in
        place), "tfds" (a prepared TensorFlow Dataset), or "tokens" (made from one of these by `python -m bitdance_jax.data.tokenize`).
      path: the folder, the tar, or the folder of tokens; for "tfds" where datasets are prepared (None: TFDS's own place).
      dataset: for "tfds": its name.
      held_out: what is evaluated on: a folder or tar, or a folder of tokens, with the same classes; for "tfds" a split such as
        "validation". None: a fixed part of the training data is kept back (`data.records.split_indices`).
      batch_size: images a step.
      augment: see AugmentConfig.
      workers: loader processes; 0 loads in threads of the training process.
      cache_latents: for class-conditional training: run the tokenizer once over the images and keep the tokens in the run's folder.
        Crops are then the centre ones; a flip chooses between two cached versions.
    """

    source: Literal["emoji", "folder", "imagenet_tar", "tfds", "tokens"] = "emoji"
    path: PathName | None = None
    dataset: str = "imagenet2012"
    held_out: PathName | None = None
    batch_size: BatchSize = 32
    augment: AugmentConfig = AugmentConfig()
    workers: Annotated[int, Range(0, 1024)] = 0
    cache_latents: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = _PATHS.get(self.source)
        require(
            needed is None or self.path is not None,
            f"data.source {self.source} needs --data.path, {needed}",
        )
        for name, value in (("path", self.path), ("held_out", self.held_out)):
            flag = "--data." + name.replace("_", "-")
            require(
                self.source != "emoji" or value is None,
                f"{flag} {value} needs --data.source too: folder, imagenet_tar or tokens",
            )
        require(
            not (self.cache_latents and self.source == "tokens"),
            "data.source tokens has no latents to cache; add --data.no-cache-latents",
        )

    @property
    def gives_codes(self) -> bool:
        """Whether batches hold the tokenizer's bits, not images."""
        return self.cache_latents or self.source == "tokens"
