"""Speed, FLOPs and device memory of a run."""

import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from bitdance_jax.perf.flops import traced_flops
from bitdance_jax.perf.hardware import chip_of
from bitdance_jax.train.task import Objective


def training_flops(objective: Objective, batch_size: int) -> int:
    """FLOPs of the products in one training step: forward and backward for what is trained, forward
    for what is frozen. Attention in packed rows counts within documents (`Objective.counted`).

    Counted in the loss and its directional derivative, which has as many products as the gradient:
    one for each factor that depends on the parameters. So recomputation by remat does not count.
    Nothing is compiled.
    """
    objective, rows = objective.counted()
    params = jax.eval_shape(objective.init, jax.random.key(0))
    keys = jax.eval_shape(lambda key: jax.random.split(key, batch_size), jax.random.key(0))
    frozen = objective.abstract_frozen()
    batch = jax.eval_shape(objective.prepare, objective.abstract_batch(batch_size))

    def loss_and_derivative(params: Any, direction: Any, frozen: Any, batch: Any, keys: Any) -> Any:
        return jax.jvp(lambda p: objective.loss(p, frozen, batch, keys)[0], (params,), (direction,))

    return round(rows * traced_flops(loss_and_derivative, params, params, frozen, batch, keys))


def peak_flops(mesh: Mesh) -> float | None:
    """Peak FLOP/s of all devices of a mesh in bfloat16; None if not known, as for CPUs."""
    chips = [chip_of(device) for device in mesh.devices.flat]
    return sum(chip.flops for chip in chips if chip) if all(chips) else None


def memory(devices: Sequence[Any]) -> dict[str, float]:
    """Memory in use and its peak, in GiB, on the fullest device; empty if the backend reports
    none."""
    stats = [s for s in (device.memory_stats() for device in devices) if s]
    names = {"memory_gib": "bytes_in_use", "peak_memory_gib": "peak_bytes_in_use"}
    return {
        name: max(s[key] for s in stats) / 2**30
        for name, key in names.items()
        if stats and all(key in s for s in stats)
    }


class Speedometer:
    """Training speed since the last `restart`."""

    def __init__(self, batch_size: int, flops: int, peak: float | None) -> None:
        """Needs a `restart` before the first `read`.

        Args:
          batch_size: images per step, if there are always as many.
          flops: `training_flops`.
          peak: FLOP/s of all devices together; None if not known.
        """
        self._batch_size = batch_size
        self._flops = flops
        self._peak = peak

    def restart(self, step: int) -> None:
        """Starts measuring after a step."""
        self._step = step
        self._time = time.monotonic()

    def read(self, step: int, images: float | None = None) -> dict[str, float]:
        """steps_per_second, images_per_second and, if the peak is known, model_flop_utilisation
        from 0 to 1; empty right after a restart.

        Args:
          step: last one done.
          images: mean number in a step, where it is not the batch size.
        """
        if step == self._step:
            return {}
        rate = (step - self._step) / max(time.monotonic() - self._time, 1e-9)
        images = self._batch_size if images is None else images
        values = {"steps_per_second": rate, "images_per_second": rate * images}
        if self._peak is not None:
            values["model_flop_utilisation"] = rate * self._flops / self._peak
        return values
