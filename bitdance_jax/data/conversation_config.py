"""Conversations about images beside captioned images, as one sequence of training samples."""

from collections.abc import Sequence
from dataclasses import dataclass

from bitdance_jax.config.plain import Config, ImageSide, PathName, require
from bitdance_jax.data.conversations import (
    ConversationMixture,
    ConversationSample,
    ConversationSource,
)
from bitdance_jax.data.mixture import Mixture, Sample
from bitdance_jax.data.packed_batches import Samples
from bitdance_jax.data.proportions import Proportions


_KINDS = 200
"""First entry of the seed, so that the choice is independent of what the sources draw."""


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

    def beside(
        self,
        captioned: Mixture,
        sources: Sequence[ConversationSource],
        *,
        seed: int,
        size_multiple: int,
    ) -> "Mixture | CaptionsAndConversations":
        """The captioned images with a share of conversations.

        Raises:
          UserError: none of the first images can be read; or a resolution that is no multiple of
            `size_multiple`.
        """
        if not sources:
            return captioned
        conversations = ConversationMixture(
            sources, seed=seed, resolution=self.resolution, size_multiple=size_multiple
        )
        conversations.draw(0)  # A wrong folder of images is an error here, not while training.
        return CaptionsAndConversations(captioned, conversations, self.share, seed)


class CaptionsAndConversations:
    """An endless sequence of samples of both kinds; number n is computed directly.

    Args:
      captioned: captioned images.
      conversations: conversations.
      share: of the conversations.
      seed: of the order.
    """

    def __init__(
        self,
        captioned: Samples[Sample],
        conversations: Samples[ConversationSample],
        share: float,
        seed: int,
    ) -> None:
        self._sources = (captioned, conversations)
        self._choices = Proportions((round(1 - share, 9), share), (_KINDS, seed))

    def draw(self, n: int) -> Sample | ConversationSample:
        """Sample n; raises as the sources."""
        which, number = self._choices[n]
        return self._sources[which].draw(number)
