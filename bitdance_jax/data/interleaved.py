"""Samples of several kinds as one sequence of training samples."""

from collections.abc import Sequence
from typing import Generic, TypeVar

from bitdance_jax.data.packed_batches import Samples
from bitdance_jax.data.proportions import Proportions


T = TypeVar("T")

_KINDS = 200
"""First entry of the seed, so that the choice is independent of what the kinds draw."""


class Interleaved(Generic[T]):
    """An endless sequence of samples of several kinds; number n is computed directly.

    Args:
      kinds: such as captioned images and conversations.
      shares: of the kinds, exactly.
      seed: of the order.
    """

    def __init__(self, kinds: Sequence[Samples[T]], shares: Sequence[float], seed: int) -> None:
        self._kinds = tuple(kinds)
        self._choices = Proportions(shares, (_KINDS, seed))

    def draw(self, n: int) -> T:
        """Sample n; raises as the kinds."""
        which, number = self._choices[n]
        return self._kinds[which].draw(number)
