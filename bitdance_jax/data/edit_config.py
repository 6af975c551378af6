"""Where pairs for editing come from."""

from collections.abc import Sequence
from dataclasses import dataclass

from bitdance_jax.config.plain import Config, ImageSide, PathName, Share, require
from bitdance_jax.data.edits import EditMixture, EditSource, read_edits
from bitdance_jax.data.emoji_edits import emoji_edits
from bitdance_jax.io.model_lookup import EMBEDDED


@dataclass(frozen=True)
class EditDataConfig(Config):
    """Pairs of images, and instructions, to train editing on.

    Attributes:
      paths: jsonl files (`data.edits.read_edits`), or "emoji": the embedded images whose captions
        differ in one thing; none: no pairs.
      images: folder that the files' image paths are relative to; None: that of each file.
      share: of the samples.
      resolution: of the images, as the side of a square in pixels (`buckets`).
      text_drop: probability that an instruction is dropped; the model still reads the image.
    """

    paths: tuple[PathName, ...] = ()
    images: PathName | None = None
    share: float = 0.5
    resolution: ImageSide = 512
    text_drop: Share = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.share < 1, f"share must be in (0, 1), got {self.share}", "share")

    def open_splits(
        self, held_out_field: str | None = None
    ) -> tuple[list[EditSource], list[EditSource]]:
        """The pairs to train on, and those held out.

        Args:
          held_out_field: field of the files that tells which are held out; None: none of theirs.

        Raises:
          UserError: a file cannot be read, has nothing to use, or no such field.
        """
        splits = [
            (
                emoji_edits() if path == EMBEDDED else read_edits(path, self.images, held_out_field)
            ).split()
            for path in self.paths
        ]
        return (
            [train for train, _ in splits if train is not None],
            [held_out for _, held_out in splits if held_out is not None],
        )

    def samples(
        self, sources: Sequence[EditSource], *, seed: int, size_multiple: int
    ) -> EditMixture:
        """The samples of opened sources.

        Raises:
          ConfigError: a resolution that is no multiple of `size_multiple`.
        """
        return EditMixture(
            sources,
            seed=seed,
            resolution=self.resolution,
            size_multiple=size_multiple,
            text_drop=self.text_drop,
        )
