"""Training crops of several sizes: each batch has one of them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CropSizes:
    """The side of a batch's crops, as a function of the batch's number.

    Attributes:
      sizes: in pixels.
      weights: relative frequencies of the sizes.
      seed: of the draws.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    def of_batch(self, number: int) -> int:
        """Pixels along a side of the crops in a batch."""
        shares = np.array(self.weights) / sum(self.weights)
        return int(np.random.default_rng((self.seed, number)).choice(self.sizes, p=shares))
