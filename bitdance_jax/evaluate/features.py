"""Images through a feature network, on all devices of this process, one batch after the other."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from bitdance_jax.evaluate.images import Images
from bitdance_jax.io.progress import Progress


BATCH = 64


class Features(NamedTuple):
    """What a network tells of a batch of images. A network without spatial features or classes leaves them out.

    Attributes:
      pooled: what FID, precision and recall compare.
      spatial: what sFID compares.
      logits: of a classifier; for the Inception Score.
    """

    pooled: Float[Array | np.ndarray, "B D"]
    spatial: Float[Array | np.ndarray, "B S"] | None = None
    logits: Float[Array | np.ndarray, "B K"] | None = None


Network = Callable[[Any, UInt8[Array, "B H W 3"]], Features]
"""A pure function of parameters and images."""


class Extractor:
    """A feature network compiled for batches of one size, which are split over the local devices."""

    def __init__(self, network: Network, params: Any, batch_size: int = BATCH) -> None:
        """`batch_size` is rounded up to a multiple of the devices."""
        devices = jax.local_devices()
        self.batch_size = -(-batch_size // len(devices)) * len(devices)
        mesh = jax.make_mesh(
            (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
        )
        self._sharding = NamedSharding(mesh, PartitionSpec("data"))
        self._params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        self._network = jax.jit(network)

    def __call__(self, images: UInt8[np.ndarray, "B H W 3"]) -> Features:
        """Features, as numpy arrays, of up to `batch_size` images."""
        return _fetch(self._start(images), len(images))

    def stream(self, images: Images, description: str, progress: bool = True) -> Iterator[Features]:
        """Features of all images, batch by batch; the devices work on the next batch while one is used."""
        with Progress(len(images), "image", description, shown=progress) as bar:
            running: tuple[Features, int] | None = None
            for batch in images.batches(self.batch_size):
                started = self._start(batch), len(batch)
                if running:
                    yield _fetch(*running)
                    bar.advance(running[1])
                running = started
            if running:
                yield _fetch(*running)
                bar.advance(running[1])

    def _start(self, images: UInt8[np.ndarray, "B H W 3"]) -> Features:
        missing = self.batch_size - len(images)
        full = (
            np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.uint8)])
            if missing
            else images
        )
        return self._network(self._params, jax.device_put(full, self._sharding))


def _fetch(features: Features, count: int) -> Features:
    return jax.tree.map(lambda x: np.asarray(x)[:count], features)
