"""Where conversations about images come from."""

from collections.abc import Sequence
from dataclasses import dataclass

from bitdance_jax.config.plain import Config, ImageSide, PathName, require
from bitdance_jax.data.conversations import ConversationMixture, ConversationSource


@dataclass(frozen=True)
class ConversationDataConfig(Config):
    """Conversations to train on.

    Attributes:
      paths: jsonl files (`data.conversations.ConversationSource`); none: captioned images alone.
      images: folder that the files' image paths are relative to; None: that of each file.
      share: of the samples.
      resolution: of the images, as the side of a square in pixels (`buckets`).
    """

    paths: tuple[PathName, ...] = ()
    images: PathName | None = None
    share: float = 0.1
    resolution: ImageSide = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.share < 1, f"share must be in (0, 1), got {self.share}", "share")

    def open_sources(self) -> list[ConversationSource]:
        """The files.

        Raises:
          FileError: one cannot be read or has nothing to use.
        """
        return [ConversationSource(path, self.images) for path in self.paths]

    def samples(
        self, sources: Sequence[ConversationSource], *, seed: int, size_multiple: int
    ) -> ConversationMixture:
        """The samples of opened sources.

        Raises:
          ConfigError: a resolution that is no multiple of `size_multiple`.
        """
        return ConversationMixture(
            sources, seed=seed, resolution=self.resolution, size_multiple=size_multiple
        )
