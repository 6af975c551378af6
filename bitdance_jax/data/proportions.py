"""Endless sequences of choices with exact proportions, any entry of which is computed directly."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import grain
import numpy as np

from bitdance_jax.data.loader import ENDLESS


LONGEST_BLOCK = 4096

_SOURCES, _ORDER = 100, 101
"""First entries of the seeds, so that what they seed is independent."""


class Choice(NamedTuple):
    """An entry of the sequence.

    Attributes:
      which: index of the chosen weight.
      number: how many entries before this one chose the same.
    """

    which: int
    number: int


class Proportions:
    """Choices by weight, in a random order.

    Entries are shuffled in blocks. If the weights are small integers, such as 2, 7 and 1, each
    block is as long as their sum and has exactly these counts. Otherwise the counts of the first n
    entries, for n a multiple of LONGEST_BLOCK, differ from exact shares by less than the number of
    weights.

    Args:
      weights: none negative, one positive; not necessarily integers.
      seed: of the order.
    """

    def __init__(self, weights: Sequence[int | float], seed: Sequence[int]) -> None:
        # As written: 0.1 is a tenth.
        exact = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * scale) for weight in exact]
        common = math.gcd(*whole)
        self._weights = [weight // common for weight in whole]
        self._block = min(sum(self._weights), LONGEST_BLOCK)
        self._seed = tuple(seed)

    def __getitem__(self, n: int) -> Choice:
        block, within = divmod(n, self._block)
        rest = block * self._block + int(_shuffled(self._seed, block, self._block)[within])
        # The first choice takes its share of all entries, the second of those that are left, ...
        left = sum(self._weights)
        for which, weight in enumerate(self._weights):
            if weight == 0:
                continue
            before = rest * weight // left
            if (rest + 1) * weight // left > before:
                return Choice(which, before)
            rest -= before
            left -= weight
        raise AssertionError("the last choice takes all entries that are left")


@dataclass(frozen=True)
class Record:
    """A record of one of several sources.

    Attributes:
      source: index of the source.
      number: how many records of that source came before.
      epoch: of the source.
      index: of the record in the source.
    """

    source: int
    number: int
    epoch: int
    index: int


class Shuffled:
    """An endless sequence of records of several sources, by weight; each source is shuffled anew in
    each of its epochs, in which every record occurs once.

    Args:
      lengths: numbers of records of the sources.
      weights: of the sources; None: the lengths.
      seed: of the order.
    """

    def __init__(
        self, lengths: Sequence[int], weights: Sequence[int | float] | None, seed: int
    ) -> None:
        self._lengths = tuple(lengths)
        self._by_source = Proportions(weights or lengths, (_SOURCES, seed))
        self._orders = [
            grain.MapDataset.range(length).seed(_seed_of(seed, number)).shuffle().repeat(ENDLESS)
            for number, length in enumerate(lengths)
        ]

    def __getitem__(self, n: int) -> Record:
        source, number = self._by_source[n]
        index = int(self._orders[source][number])
        return Record(source, number, number // self._lengths[source], index)


def _seed_of(seed: int, source: int) -> int:
    """A seed for grain, which takes 32 bits."""
    return int(np.random.SeedSequence((_ORDER, seed, source)).generate_state(1)[0])


@functools.lru_cache(maxsize=64)
def _shuffled(seed: tuple[int, ...], block: int, length: int) -> np.ndarray:
    return np.random.default_rng((*seed, block)).permutation(length)
