"""What a text-to-image run trains on: captioned images, conversations and edits."""

import dataclasses
from typing import Any

from bitdance_jax.data import captioned
from bitdance_jax.data.captioned import CaptionedSource
from bitdance_jax.data.captioned_encoding import EncodedImages, EncodedSource
from bitdance_jax.data.edits import EditSource
from bitdance_jax.data.interleaved import Interleaved
from bitdance_jax.data.mixture import Mixture
from bitdance_jax.data.packed_batches import Encode, Samples
from bitdance_jax.io.progress import report
from bitdance_jax.train.sample_documents import AnySample
from bitdance_jax.train.text_to_image_config import PackedDataConfig


class TrainingData:
    """The opened sources of a run, and the samples that are drawn from them.

    Attributes:
      train, held_out: captioned images.
      conversations: to train on; none are held out.
      edits, held_out_edits: pairs.

    Raises:
      UserError: data is missing or unreadable, or has another layout.
    """

    def __init__(self, config: PackedDataConfig) -> None:
        self._config = config
        self.train, self.held_out = config.open_splits()
        self.conversations = config.conversations.open_sources()
        self.edits, self.held_out_edits = config.edits.open_splits(config.held_out_field)

    def report(self) -> None:
        """Reports the numbers of records and what is skipped."""
        for source in self.train:
            report(captioned.summary(source))
        report(f"{sum(map(len, self.held_out)):,} captioned images are held out")
        for file in self.conversations:
            report(captioned.summary(file, "conversations"))
        for edits in self.edits:
            report(captioned.summary(edits, "pairs"))
        if self.edits:
            report(f"{sum(map(len, self.held_out_edits)):,} pairs are held out")

    def encode(self, encode: Encode, size_multiple: int) -> None:
        """Makes tokens of all captioned images and pairs, which the samples then have."""
        config = self._config
        options: dict[str, Any] = {"size_multiple": size_multiple}

        def source(one: CaptionedSource) -> CaptionedSource:
            if getattr(one, "manifest", None) is not None:
                return one
            resolutions = config.resolutions
            return EncodedSource(
                one, encode, resolutions=resolutions, too_small=config.too_small, **options
            )

        self.train = [source(one) for one in self.train]
        self.held_out = [source(one) for one in self.held_out]
        options["resolutions"] = (config.edits.resolution,)
        self.edits = [_encoded(one, encode, options) for one in self.edits]
        self.held_out_edits = [_encoded(one, encode, options) for one in self.held_out_edits]

    def training_samples(self, *, seed: int, size_multiple: int) -> Samples[AnySample]:
        """The samples to train on. What cannot be read is an error here, before anything
        compiles."""
        config = self._config
        options: Any = {"seed": seed, "size_multiple": size_multiple}
        kinds: list[Samples[AnySample]] = [config.samples(self.train, **options)]
        shares = [config.captioned_share]
        if self.conversations:
            kinds.append(config.conversations.samples(self.conversations, **options))
            shares.append(config.conversations.share)
        if self.edits:
            kinds.append(config.edits.samples(self.edits, **options))
            shares.append(config.edits.share)
        for kind in kinds:
            kind.draw(0)
        return kinds[0] if len(kinds) == 1 else Interleaved(kinds, shares, seed)

    def held_out_captions(self, size_multiple: int) -> Mixture:
        """Samples of the held-out captioned images."""
        plain = dataclasses.replace(self._config, text_drop=0.0, weights=())
        return plain.samples(self.held_out, seed=0, size_multiple=size_multiple)

    def held_out_samples(self, size_multiple: int) -> Samples[AnySample]:
        """Samples of the held-out captioned images, and of the held-out pairs where there are."""
        images = self.held_out_captions(size_multiple)
        if not self.held_out_edits:
            return images
        edits = dataclasses.replace(self._config.edits, text_drop=0.0)
        pairs = edits.samples(self.held_out_edits, seed=0, size_multiple=size_multiple)
        return Interleaved([images, pairs], [round(1 - edits.share, 9), edits.share], 0)


def _encoded(source: EditSource, encode: Encode, options: dict[str, Any]) -> EditSource:
    used = sorted({number for pair in source.pairs for number in (pair.source, pair.target)})
    return source.with_images(EncodedImages(source.images, used, encode, **options))
