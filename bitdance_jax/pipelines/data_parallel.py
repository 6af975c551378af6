"""Class-balanced images on all devices of all hosts."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, UInt8

from bitdance_jax.config import SamplerConfig
from bitdance_jax.config.plain import Count, checked
from bitdance_jax.distributed import multihost
from bitdance_jax.distributed.mesh import (
    BATCH,
    local_rows,
    make_mesh,
    put_batch,
    replicate,
)
from bitdance_jax.pipelines.class_conditional import ClassConditionalPipeline, image_keys
from bitdance_jax.sampling.next_patch import Scales
from bitdance_jax.sampling.solvers import Solver


class DataParallelSampler:
    """Draws images of a seed in order; image i has label i % num_classes.

    Each device draws `per_device` consecutive images at a time: its program and its rows are the same on any number of devices, and so
    are the images, bit for bit, on devices of one kind. Another `per_device` may change a pixel by rounding; so may CPUs that are made
    to be more devices than they have cores, because XLA then splits sums over more threads.

    Attributes:
      batch_size: images drawn at a time on all devices together.
    """

    def __init__(self, model: ClassConditionalPipeline, per_device: int) -> None:
        """Puts the weights on every device; samplers may then differ from call to call."""
        per_device = checked(Count, per_device, "batch_size")
        self._model, self._mesh = model, make_mesh()
        self._params = replicate(self._mesh, model.params)
        self._draw = on_each_device(self._mesh, model.draw)
        self.batch_size = per_device * self._mesh.size

    def batches(
        self, seed: int, first: int, count: int, sampler: SamplerConfig | None = None
    ) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
        """Images `first` ... `count` - 1 on every host, batch by batch. The devices draw the next batch while the caller has one."""
        ahead: Array | None = None
        for start in range(first, count, self.batch_size):
            drawn, ahead = ahead, self._start_batch(seed, start, sampler or self._model.sampler)
            if drawn is not None:
                yield multihost.gather(drawn)
        if ahead is not None:
            yield multihost.gather(ahead)[: (count - first - 1) % self.batch_size + 1]

    def _start_batch(self, seed: int, start: int, sampler: SamplerConfig) -> Array:
        """A full batch, the last one too: images past the end are drawn and dropped, to keep one compiled shape."""
        solver, scales = self._model.resolve(sampler)
        keys = np.asarray(jax.random.key_data(image_keys(seed, start, self.batch_size)))
        labels = balanced_labels(start, self.batch_size, self._model.config.num_classes).astype(
            np.int32
        )
        mine = local_rows(self._mesh, self.batch_size)
        rows = put_batch(self._mesh, (labels[mine], keys[mine]), self.batch_size)
        return self._draw(self._params, *rows, scales, solver=solver)


def on_each_device(mesh: Mesh, draw: Callable[..., Array]) -> Callable[..., Array]:
    """`draw(params, labels, keys, scales, solver=)` of every device's own rows, jitted; it takes the data of the keys.

    The weights are whole on every device, the rows lie as `batch_sharding` says.
    """

    def sharded(
        params: Any, labels: Array, key_data: Array, scales: Scales, *, solver: Solver
    ) -> Array:
        def one_device(params: Any, labels: Array, key_data: Array, scales: Scales) -> Array:
            return draw(params, labels, jax.random.wrap_key_data(key_data), scales, solver=solver)

        # Not left to the partitioner: the guidance rows, joined to the batch, would travel between devices. Nothing here does.
        rows = P(BATCH)
        run = jax.shard_map(
            one_device, mesh=mesh, in_specs=(P(), rows, rows, P()), out_specs=rows, check_vma=False
        )
        return run(params, labels, key_data, scales)

    return jax.jit(sharded, static_argnames="solver")


def balanced_labels(first: int, count: int, num_classes: int) -> np.ndarray:
    """Labels int64 [count] of images `first` and up: i % num_classes, so that 50,000 hold each of 1,000 classes 50 times."""
    return np.arange(first, first + count) % num_classes
