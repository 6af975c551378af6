"""Documents packed into rows of a fixed length.

Each row of a batch is filled from its own stream of documents, so that a row depends neither on the
number of hosts nor on which of them loads it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bitdance_jax.config.plain import Config, Count, require
from bitdance_jax.data.documents import NO_LABEL, Document


PADDING = -1
"""Number of the document that padding belongs to."""

Row = dict[str, np.ndarray]
"""A packed row; S positions, N patches of P tokens:

  tokens, positions, documents, limits, labels: int32 [S]; positions restart in every document,
    `documents` numbers them and is PADDING behind the last, `limits` count within the row.
  visual, conditions: int32 [N, P] positions in the row, S where a patch is not used.
  bits: uint8 [N, P, bytes], xy: int32 [N, P, 2].
  generated: bool [N].
  area: int32 [N] number of tokens of the patch's image, 1 where a patch is not used.
"""


@dataclass(frozen=True)
class Lengths(Config):
    """Sizes of packed rows, in tokens.

    Attributes:
      target: a row is full once it has this many.
      row: S, the most that it has; the rest is padding.
      document: longest document; longer ones are skipped.
      buffer: documents that did not fit and wait for the next rows.
    """

    target: Count = 33_280
    row: Count = 37_376
    document: Count = 16_384
    buffer: Count = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.target <= self.row,
            f"target must be at most row, got {self.target} and {self.row}",
            "target",
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest document that fits."""
        return min(self.document, self.row)


@dataclass
class PackingState:
    """Where a row's stream of documents is, as JSON-ready numbers.

    Attributes:
      next_document: number in the stream of the next document to be read.
      waiting: numbers of those that were read and did not fit, the oldest first.
    """

    next_document: int = 0
    waiting: list[int] = field(default_factory=list)


class RowPacker:
    """The rows that one stream of documents is packed into.

    Waiting documents come first, in order, then new ones. A document that does not fit waits, until
    `Lengths.buffer` of them do; then the row is closed.
    """

    def __init__(
        self,
        read: Callable[[int], Document | None],
        lengths: Lengths,
        state: PackingState | None = None,
    ) -> None:
        """
        Args:
          read: document number n of an endless stream, always the same; None if it is skipped.
          lengths: of the rows.
          state: where to resume.
        """
        self._read = read
        self._lengths = lengths
        self._documents: dict[int, Document | None] = {}  # those that wait
        self.state = PackingState() if state is None else state

    def next_row(self) -> list[Document]:
        """The documents of the next row."""
        lengths = self._lengths
        row: list[Document] = []
        used = 0
        still_waiting = []
        for number in self.state.waiting:
            document = self._waiting(number)
            if document is None:
                continue
            if used < lengths.target and used + len(document) <= lengths.row:
                row.append(document)
                used += len(document)
                del self._documents[number]
            else:
                still_waiting.append(number)
        self.state.waiting = still_waiting
        while used < lengths.target and len(self.state.waiting) < lengths.buffer:
            number = self.state.next_document
            self.state.next_document += 1
            document = self._read_short(number)
            if document is None:
                continue
            if used + len(document) <= lengths.row:
                row.append(document)
                used += len(document)
            else:
                self.state.waiting.append(number)
                self._documents[number] = document
        return row

    def _waiting(self, number: int) -> Document | None:
        """A document that waits; after resuming it is read again."""
        if number not in self._documents:
            self._documents[number] = self._read_short(number)
        return self._documents[number]

    def _read_short(self, number: int) -> Document | None:
        """A document; None if it is skipped. One that fits no row would wait for ever."""
        document = self._read(number)
        fits = document is not None and len(document) <= self._lengths.longest
        return document if fits else None


def pack(
    documents: Sequence[Document], length: int, *, patches: int, block: int, num_bytes: int
) -> Row:
    """Documents one after the other in a row of `length` positions and `patches` patches.

    Args:
      documents: whose lengths add up to `length` at most, and whose images have bits.
      length: S.
      patches: N, at least those of the documents.
      block: P, tokens of a patch.
      num_bytes: of a token's packed bits.
    """
    row: Row = {
        "tokens": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
        "documents": np.full(length, PADDING, np.int32),
        # Padding sees itself alone.
        "limits": np.arange(1, length + 1, dtype=np.int32),
        "labels": np.full(length, NO_LABEL, np.int32),
        "visual": np.full((patches, block), length, np.int32),
        "conditions": np.full((patches, block), length, np.int32),
        "bits": np.zeros((patches, block, num_bytes), np.uint8),
        "xy": np.zeros((patches, block, 2), np.int32),
        "generated": np.zeros(patches, bool),
        "area": np.ones(patches, np.int32),
    }
    start = 0
    patch = 0
    for number, document in enumerate(documents):
        here = slice(start, start + len(document))
        row["tokens"][here] = document.tokens
        row["positions"][here] = np.arange(len(document))
        row["documents"][here] = number
        row["limits"][here] = document.limits + start
        row["labels"][here] = document.labels
        these = slice(patch, patch + len(document.visual))
        row["visual"][these] = document.visual + start
        row["conditions"][these] = document.conditions + start
        row["xy"][these] = document.xy
        row["generated"][these] = document.generated
        row["area"][these] = document.area
        if document.images:
            bits = np.concatenate([image.bits for image in document.images])
            row["bits"][these] = bits.reshape(-1, block, num_bytes)
        start = here.stop
        patch = these.stop
    return row


def stack(rows: Sequence[Row]) -> dict[str, Any]:
    """A batch of rows."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
