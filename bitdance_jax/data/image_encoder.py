"""A tokenizer's encoder for images of mixed sizes, on this process's own devices.

In text-to-image training it runs ahead of the training step, outside of it: a step then has one
shape whatever the sizes of its images, and reads bits as if they had been made ahead of time.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, UInt8

from bitdance_jax.config import TokenizerConfig
from bitdance_jax.errors import UserError
from bitdance_jax.io import image_files
from bitdance_jax.tokenizer.autoencoder import Autoencoder


Params = Any


CHUNK_PIXELS = 2**20
"""Pixels that a device encodes at a time: one image of 1024 x 1024."""

CHUNK_IMAGES = 16
"""The most images that a device encodes at a time."""


class ImageEncoder:
    """Packed bits of images (`packed_batches.Encode`).

    There is one program for each size. It always encodes as many images, of which the last may be
    padding, so an image's bits do not depend on the others.
    """

    def __init__(self, config: TokenizerConfig, params: Params, dtype: DTypeLike) -> None:
        """
        Args:
          config: sizes of the tokenizer.
          params: its weights; only those of the encoder are used.
          dtype: compute type.

        Raises:
          UserError: the tokenizer has no bits.
        """
        if config.latents != "bits":
            raise UserError(
                "captioned images are stored as bits, and the tokenizer's latents are continuous; "
                "take a tokenizer of bits"
            )
        devices = jax.local_devices()
        mesh = Mesh(np.array(devices), ("images",))
        self._rows = NamedSharding(mesh, PartitionSpec("images"))
        self._devices = len(devices)
        converted = {"encoder": jax.tree.map(lambda x: x.astype(dtype), params["encoder"])}
        self._params = jax.device_put(converted, NamedSharding(mesh, PartitionSpec()))
        model = Autoencoder(config, jnp.dtype(dtype))

        def encode(params: Params, images: UInt8[Array, "B H W 3"]) -> UInt8[Array, "B h w bytes"]:
            z: Any = model.apply({"params": params}, image_files.to_model(images), method="encode")
            return jnp.packbits(z > 0, axis=-1)

        self._encode = jax.jit(encode, out_shardings=self._rows)

    def __call__(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        of_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, image in enumerate(images):
            of_size[image.shape].append(number)
        results = []
        for (height, width, _), numbers in of_size.items():
            each = min(CHUNK_IMAGES, max(1, CHUNK_PIXELS // (height * width)))
            chunk = each * self._devices
            for start in range(0, len(numbers), chunk):
                some = numbers[start : start + chunk]
                padded = [*some, *[some[-1]] * (chunk - len(some))]
                batch = np.stack([images[number] for number in padded])
                placed = jax.device_put(batch, self._rows)
                results.append((some, self._encode(self._params, placed)))
        codes: dict[int, np.ndarray] = {}
        for numbers, encoded in results:
            codes |= zip(numbers, np.asarray(encoded), strict=False)
        return [codes[number] for number in range(len(images))]
