"""Images with captions: their record, the protocol of sources, and what sources share.

Sources are files of their own: `captioned_folder`, `webdataset`, `captioned_tables`,
`captioned_tfds` and `captioned_tokens`. `mixture` draws training samples from several of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from bitdance_jax.errors import ConfigError
from bitdance_jax.io.image_files import DamagedImage


NAMED = 3
"""Number of skipped samples that a summary names for each reason."""

TEXT = "text"
"""Field of the captions, unless another is named."""

NO_CAPTION = "images without a caption"
NO_IMAGE = "captions without an image"


@dataclass(frozen=True)
class Tokens:
    """An image as bits that the tokenizer made ahead of time.

    Attributes:
      bits: of the tokens in raster order, whatever P: 8 bits per byte as by `numpy.packbits`.
      size: height and width of the image in pixels.
    """

    bits: UInt8[np.ndarray, "h w bytes"]
    size: tuple[int, int]


@dataclass(frozen=True)
class CaptionedImage:
    """An image, as pixels or as tokens, and its captions.

    Attributes:
      captions: at least one, none of them empty.
      image: RGB, transparency on white; None if there are tokens.
      tokens: see Tokens; None if there is an image.
      versions: tokens by resolution, in the records of a source of tokens; a sample has one of them
        as `tokens`.
    """

    captions: tuple[str, ...]
    image: UInt8[np.ndarray, "H W 3"] | None = None
    tokens: Tokens | None = None
    versions: Mapping[int, Tokens] | None = None

    def __post_init__(self) -> None:
        if not self.captions or not all(self.captions):
            raise ValueError("an image needs at least one caption, and none may be empty")
        if sum(part is not None for part in (self.image, self.tokens, self.versions)) != 1:
            raise ValueError("a record has an image, tokens or versions")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, where there is one version."""
        if self.tokens is not None:
            return self.tokens.size
        assert self.image is not None
        return self.image.shape[0], self.image.shape[1]


@runtime_checkable
class Images(Protocol):
    """A sequence of captioned images.

    Reading a record raises `image_files.DamagedImage` if only that record cannot be used.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> CaptionedImage: ...


@runtime_checkable
class Summarized(Protocol):
    """What `summary` is about."""

    location: str
    skipped: "Skips"

    def __len__(self) -> int: ...


@runtime_checkable
class CaptionedSource(Protocol):
    """A sequence of captioned images.

    Reading a record raises `image_files.DamagedImage` if only that record cannot be used, and a
    UserError if the source cannot be read. Sources are read by several threads and, pickled, by
    worker processes.

    Attributes:
      location: where the records come from, for messages.
      skipped: see Skips: samples that the source leaves out, known when it opens.
      splits: the value of each record's split field, if the source was opened with one.
    """

    location: str
    skipped: "Skips"
    splits: Sequence[str] | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> CaptionedImage: ...

    def captions_of(self, index: int) -> tuple[str, ...]:
        """Those of a record, whose image is not decoded."""
        ...


class Skips:
    """How many samples a source leaves out, by reason, and the names of a few."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """`reason` such as "images without a caption"."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self._names.setdefault(reason, [])
        if len(names) < NAMED:
            names.append(name)

    def __str__(self) -> str:
        """One line; empty if there are none."""
        parts = []
        for reason, count in self.counts.items():
            names = ", ".join(self._names[reason])
            more = ", ..." if count > NAMED else ""
            parts.append(f"{reason}: {count:,} ({names}{more})")
        return "; ".join(parts)


class CaptionedSubset:
    """Some records of a source, in the given order."""

    def __init__(self, source: CaptionedSource, indices: Int[np.ndarray, "N"]) -> None:
        self.source = source
        self.indices = indices
        self.location = source.location
        self.skipped = source.skipped
        self.manifest: Any = getattr(source, "manifest", None)
        splits = source.splits
        self.splits: Sequence[str] | None = None
        if splits is not None:
            self.splits = [splits[int(index)] for index in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> CaptionedImage:
        return self.source[int(self.indices[index])]

    def captions_of(self, index: int) -> tuple[str, ...]:
        return self.source.captions_of(int(self.indices[index]))


def summary(source: Summarized, kind: str = "captioned images") -> str:
    """A line about the number of records and what was skipped.

    Args:
      source: of captioned images or of conversations.
      kind: what its records are.
    """
    skipped = str(source.skipped)
    return f"{source.location}: {len(source):,} {kind}" + (
        f"; skipped: {skipped}" if skipped else ""
    )


def clean_captions(value: Any) -> tuple[str, ...]:
    """The captions in a field's value, a string or a list of strings, on one line each.

    Empty ones, and values of other types, are left out.
    """
    values = value if isinstance(value, list | tuple | np.ndarray) else [value]
    texts = (" ".join(text.split()) for text in values if isinstance(text, str))
    return tuple(text for text in texts if text)


def require_captions(value: Any, name: str) -> tuple[str, ...]:
    """The captions in a field's value.

    Args:
      value: see `clean_captions`.
      name: of the sample.

    Raises:
      DamagedImage: there are none.
    """
    captions = clean_captions(value)
    if not captions:
        raise DamagedImage(f"{name} has no caption, or an empty one", name)
    return captions


def require_field(record: Mapping[str, Any] | Iterable[str], field: str, where: str) -> None:
    """Raises a ConfigError that names the fields there are, if `field` is not among them."""
    names = sorted(record)
    if field not in names:
        raise ConfigError(
            f"{where} has no field {field!r}; it has: {', '.join(names) or 'none'}"
            " (data.captions names the field of the captions, data.held_out_field that of the"
            " split)",
            "data.captions",
        )
