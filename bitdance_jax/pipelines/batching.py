"""Random keys of images, and arrays in chunks of one compiled shape."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from bitdance_jax.pipelines import checks


Seeds = int | Sequence[int]
"""One seed of all images of a call, or one seed for each image."""


@dataclass(frozen=True)
class ImageKeys:
    """The random keys of the images of a call: each depends on a seed and an index alone.

    With one seed, image i has the index `first_index` + i. With a list, image i has the seed
    `seeds[i]` and the index `first_index`: it is the image that this seed alone gives there.

    Attributes:
      seeds: one, or one for each image.
      first_index: of the first image, or of all with a list of seeds.
      count: number of images.
    """

    seeds: tuple[int, ...] | int
    first_index: int
    count: int

    @classmethod
    def checked(cls, seed: Seeds, first_index: int, count: int) -> "ImageKeys":
        """
        Raises:
          ConfigError: a seed or an index is not a number of 32 bits, or the number of seeds is not
            that of the images.
        """
        seeds = checks.seeds(seed, count)
        indices = count if isinstance(seeds, int) else 1
        return cls(seeds, checks.first_index(first_index, indices), count)

    def seed_and_index(self, image: int) -> tuple[int, int]:
        """Those of one image."""
        if isinstance(self.seeds, int):
            return self.seeds, self.first_index + image
        return self.seeds[image], self.first_index

    def data(self, images: np.ndarray) -> UInt32[np.ndarray, "B 2"]:
        """The keys of the images with these numbers, as `jax.random.key_data`."""
        if isinstance(self.seeds, int):
            seeds = np.full(len(images), self.seeds, np.uint32)
            indices = self.first_index + images
        else:
            seeds = np.asarray(self.seeds, np.uint32)[images]
            indices = np.full(len(images), self.first_index)
        return np.asarray(_keys(seeds, indices.astype(np.uint32)))


@jax.jit
@jax.vmap
def _keys(seed: Array, index: Array) -> Array:
    return jax.random.key_data(jax.random.fold_in(jax.random.key(seed), index))


def image_keys(seed: Seeds, first_index: int, count: int) -> Array:
    """Keys [count] of images; see `ImageKeys`."""
    keys = ImageKeys.checked(seed, first_index, count)
    return jax.random.wrap_key_data(jnp.asarray(keys.data(np.arange(count))))


def chunks(array: Any, size: int) -> Iterator[tuple[Any, int]]:
    """Chunks of `size` rows, and the number of valid rows in each.

    A short last chunk repeats its last row, so that all have one compiled shape.
    """
    size = min(size, max(len(array), 1))
    for start in range(0, len(array), size):
        rows = np.arange(start, start + size).clip(max=len(array) - 1)
        yield array[rows], min(size, len(array) - start)
