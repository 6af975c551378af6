"""Where captioned images come from: the config that opens the sources and mixes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from bitdance_jax.config.plain import (
    Config,
    ImageSide,
    NotNegative,
    PathName,
    Range,
    Share,
    require,
)
from bitdance_jax.data import captioned_tables, tar_shards
from bitdance_jax.data.buckets import TooSmall
from bitdance_jax.data.captioned import CaptionedSource, CaptionedSubset
from bitdance_jax.data.captioned_folder import CaptionedFolderSource
from bitdance_jax.data.captioned_tables import TableSource, is_saved_dataset
from bitdance_jax.data.captioned_tokens import CaptionedTokensSource, is_captioned_tokens
from bitdance_jax.data.emoji import CaptionedEmojiSource
from bitdance_jax.data.mixture import Mixture
from bitdance_jax.data.patterns import names_files
from bitdance_jax.data.records import HELD_OUT_STRIDE, split_indices
from bitdance_jax.data.split_fields import held_out_rows
from bitdance_jax.data.tfds import CaptionedTfdsSource
from bitdance_jax.data.webdataset import WebDatasetSource
from bitdance_jax.errors import ConfigError
from bitdance_jax.io.model_lookup import EMBEDDED


PAPER_RESOLUTIONS = (256, 512, 1024)
PAPER_WEIGHTS = (2.0, 7.0, 1.0)
"""Of the samples of pre-training (paper table 4)."""


@dataclass(frozen=True)
class CaptionedDataConfig(Config):
    """Captioned images to train on: one source or several, mixed by weight.

    Attributes:
      paths: where the images are, one path a source, whose kind follows from it: a folder of
        images, tar files of WebDataset such as "shard-{000..099}.tar", Parquet files, a folder that
        Hugging Face's datasets saved, one that `bitdance tokenize` wrote, or "tfds:NAME@SPLIT"
        (docs/data.md).
      weights: shares of the samples, one for each path; empty: the numbers of images.
      captions: field of the captions, one for all paths or one for each; empty: that of the format.
      held_out: paths of evaluation data; empty: part of the training data is held out.
      held_out_field: a field of the records, such as "split", that tells which images are held out:
        those where it is held_out, heldout, validation, val or test. None: every 19th image, and
        of more than 19,000 about a thousand.
      resolutions: of training samples, as the side of a square in pixels (`buckets`).
      resolution_weights: shares of the samples, one for each resolution; empty: the paper's 2:7:1
        for its three resolutions, else equal ones.
      text_drop: probability that a caption is dropped.
      too_small: an image that does not cover its bucket is enlarged ("upscale") or left out
        ("skip").
      workers: loader processes; 0 loads in threads of the training process.
    """

    paths: tuple[PathName, ...] = ()
    weights: tuple[NotNegative, ...] = ()
    captions: tuple[str, ...] = ()
    held_out: tuple[PathName, ...] = ()
    held_out_field: str | None = None
    resolutions: tuple[ImageSide, ...] = PAPER_RESOLUTIONS
    resolution_weights: tuple[NotNegative, ...] = ()
    text_drop: Share = 0.1
    too_small: TooSmall = "upscale"
    workers: Annotated[int, Range(0, 1024)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (("weights", self.paths), ("resolution_weights", self.resolutions)):
            weights = getattr(self, name)
            require(
                not weights or len(weights) == len(values),
                f"{name} must have one number for each of {len(values)}, got {len(weights)}",
                name,
            )
            require(not weights or sum(weights) > 0, f"{name} must not all be zero", name)
        require(
            len(self.captions) in (0, 1, len(self.paths)),
            f"captions must name one field, or one for each of {len(self.paths)} paths, got"
            f" {len(self.captions)}",
            "captions",
        )
        require(bool(self.resolutions), "resolutions must name one at least", "resolutions")
        require(
            len(set(self.resolutions)) == len(self.resolutions),
            "resolutions must differ",
            "resolutions",
        )
        require(
            not self.held_out or self.held_out_field is None,
            "held_out and held_out_field exclude each other",
            "held_out",
        )

    def open_splits(self) -> tuple[list[CaptionedSource], list[CaptionedSource]]:
        """The sources to train on, and those held out.

        Raises:
          UserError: there are no paths; or the data is missing or unreadable, or has another
            layout.
        """
        train, held_out = self.open_marked()
        if held_out:
            return train, held_out
        rows = [_every_nth(source) for source in train]
        if not any(part.any() for part in rows):
            raise ConfigError(
                f"no image is held out: there are only {sum(map(len, train))}, of which every"
                f" {HELD_OUT_STRIDE}th would be; set data.held_out or data.held_out_field",
                "data.held_out",
            )
        return _split(train, rows)

    def open_marked(self) -> tuple[list[CaptionedSource], list[CaptionedSource]]:
        """As `open_splits`, but images are held out only where paths, a field or the source itself
        say it."""
        require(
            bool(self.paths),
            "data.paths must name captioned images: a folder, tar files, Parquet files ...",
            "data.paths",
        )
        sources = [
            open_source(path, self._caption(number), self.held_out_field)
            for number, path in enumerate(self.paths)
        ]
        if self.held_out:
            # A path of its own has the field of the first training path.
            return sources, [open_source(path, self._caption(0)) for path in self.held_out]
        if all(source.splits is None for source in sources):
            return sources, []
        return _split(sources, [_marked(source) for source in sources])

    @property
    def resolution_shares(self) -> tuple[float, ...]:
        """Of the samples, one for each resolution."""
        if self.resolution_weights:
            return self.resolution_weights
        is_paper = self.resolutions == PAPER_RESOLUTIONS
        return PAPER_WEIGHTS if is_paper else (1.0,) * len(self.resolutions)

    def samples(
        self, sources: Sequence[CaptionedSource], *, seed: int, size_multiple: int
    ) -> Mixture:
        """The samples of opened sources.

        Args:
          sources: those to train on. (Held-out ones may be fewer than `weights`.)
          seed: of everything that is random.
          size_multiple: see `TextToImageConfig.size_multiple`.

        Raises:
          ConfigError: a resolution is no multiple of it.
        """
        return Mixture(
            sources,
            seed=seed,
            weights=self.weights or None,
            resolutions=self.resolutions,
            resolution_weights=self.resolution_shares,
            size_multiple=size_multiple,
            text_drop=self.text_drop,
            too_small=self.too_small,
        )

    def _caption(self, number: int) -> str | None:
        if not self.captions:
            return None
        return self.captions[number if len(self.captions) > 1 else 0] or None


def open_source(
    path: str, caption: str | None = None, split_field: str | None = None
) -> CaptionedSource:
    """The source at a path.

    Args:
      path: see `CaptionedDataConfig.paths`.
      caption: field of the captions; None: that of the format.
      split_field: a field whose values become `splits`.

    Raises:
      UserError: see the sources.
    """
    if path == EMBEDDED:
        return CaptionedEmojiSource()
    if is_captioned_tokens(path):
        require(
            caption is None and split_field is None,
            f"the tokens in {path} have their captions and held-out images; leave out data.captions"
            " and data.held_out_field",
        )
        return CaptionedTokensSource(path)
    kind, _, name = path.partition(":")
    if kind == "tfds":
        return CaptionedTfdsSource(name, caption, split_field)
    if is_saved_dataset(path) or names_files(path, captioned_tables.SUFFIX):
        return TableSource(path, caption, split_field)
    if names_files(path, tar_shards.SUFFIX):
        return WebDatasetSource(path, caption, split_field)
    return CaptionedFolderSource(path, caption, split_field)


def _every_nth(source: CaptionedSource) -> np.ndarray:
    """A fixed part of the records, bool [N]."""
    rows = np.zeros(len(source), bool)
    rows[split_indices(len(source), "heldout")] = True
    return rows


def _marked(source: CaptionedSource) -> np.ndarray:
    """Which records the source's splits hold out, bool [N]."""
    if source.splits is None:
        return np.zeros(len(source), bool)
    return held_out_rows(source.splits, source.location)


def _split(
    sources: Sequence[CaptionedSource], held_out: Sequence[np.ndarray]
) -> tuple[list[CaptionedSource], list[CaptionedSource]]:
    """The records of each source that are not held out; and those that are, where there are any."""
    pairs = list(zip(sources, held_out, strict=True))
    return (
        [CaptionedSubset(source, np.flatnonzero(~rows)) for source, rows in pairs],
        [CaptionedSubset(source, np.flatnonzero(rows)) for source, rows in pairs if rows.any()],
    )
