"""Features of images by a feature network, batch by batch, on all devices of this process."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt8

from bitdance_jax.evaluate.images import Images
from bitdance_jax.fid.inception import Features
from bitdance_jax.io.progress import Progress


BATCH = 64


Network = Callable[[Any, UInt8[Array, "B H W 3"]], Features]
"""A pure function of parameters and images."""


class Extractor:
    """A feature network compiled for one batch size; batches are sharded over the local devices."""

    def __init__(self, network: Network, params: Any, batch_size: int = BATCH) -> None:
        """`batch_size` is rounded up to a multiple of the number of devices."""
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
        """Features of all images. While one batch is used, the devices compute the next."""
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
        if missing:
            images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.uint8)])
        return self._network(self._params, jax.device_put(images, self._sharding))


def _fetch(features: Features, count: int) -> Features:
    return jax.tree.map(lambda x: np.asarray(x)[:count], features)
