"""Documents of random lengths for tests of packing."""

import numpy as np

from bitdance_jax.data.documents import Document
from bitdance_jax.data.packing import Lengths


BLOCK = 2
LENGTHS = Lengths(target=90, row=100, document=60, buffer=10)


def document(number: int) -> Document | None:
    """One of 3 to 60 tokens, all of which are its number; every seventh is skipped."""
    if number % 7 == 6:
        return None
    rng = np.random.default_rng(number)
    length = int(rng.integers(3, LENGTHS.document + 1))
    patches = length // 4
    positions = np.arange(patches * BLOCK, dtype=np.int32).reshape(-1, BLOCK)
    return Document(
        tokens=np.full(length, number, np.int32),
        limits=np.arange(1, length + 1, dtype=np.int32),
        labels=np.full(length, -1, np.int32),
        visual=positions,
        conditions=positions,
        xy=np.zeros((patches, BLOCK, 2), np.int32),
        generated=np.ones(patches, bool),
        area=np.full(patches, patches * BLOCK, np.int32),
    )
