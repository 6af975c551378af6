"""How fast a run goes and how much of its devices it uses."""

import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from bitdance_jax.perf.flops import traced_flops
from bitdance_jax.perf.hardware import chip_of
from bitdance_jax.train.task import Objective


def training_flops(objective: Objective, batch_size: int) -> int:
    """Operations of the products that one training step needs: forward and backward of what trains, forward of what is frozen.

    They are those of the loss and its derivative along one direction, which takes as many products as the gradient: one for each factor
    that depends on the parameters. So nothing counts twice that rematerialisation computes twice. Traced only: nothing is compiled.
    """
    objective = objective.without_fused_kernels()
    params = jax.eval_shape(objective.init, jax.random.key(0))
    keys = jax.eval_shape(lambda key: jax.random.split(key, batch_size), jax.random.key(0))
    frozen, batch = objective.abstract_frozen(), objective.abstract_batch(batch_size)

    def loss_and_derivative(params: Any, direction: Any, frozen: Any, batch: Any, keys: Any) -> Any:
        return jax.jvp(lambda p: objective.loss(p, frozen, batch, keys)[0], (params,), (direction,))

    return traced_flops(loss_and_derivative, params, params, frozen, batch, keys)


def peak_flops(mesh: Mesh) -> float | None:
    """Operations a second of all devices of a mesh, in bfloat16; None where that is not known, as of CPUs."""
    chips = [chip_of(device) for device in mesh.devices.flat]
    return sum(chip.flops for chip in chips if chip) if all(chips) else None


def memory(devices: Sequence[Any]) -> dict[str, float]:
    """Memory in use and its peak since the start, in GiB, of that device which uses most; empty where the backend does not say."""
    stats = [s for s in (device.memory_stats() for device in devices) if s]
    names = {"memory_gib": "bytes_in_use", "peak_memory_gib": "peak_bytes_in_use"}
    return {
        name: max(s[key] for s in stats) / 2**30
        for name, key in names.items()
        if stats and all(key in s for s in stats)
    }


class Speedometer:
    """Training speed since the last `restart`, so that compilation, previews and saves do not count."""

    def __init__(self, batch_size: int, flops: int, peak: float | None) -> None:
        """Needs a `restart` before the first `read`.

        Args:
          batch_size: images of a step.
          flops: `training_flops`.
          peak: operations a second of all devices together; None where it is not known.
        """
        self._batch_size, self._flops, self._peak = batch_size, flops, peak

    def restart(self, step: int) -> None:
        self._step, self._time = step, time.monotonic()

    def read(self, step: int) -> dict[str, float]:
        """steps_per_second, images_per_second and, with a known peak, model_flop_utilisation from 0 to 1; empty right after a restart."""
        if step == self._step:
            return {}
        rate = (step - self._step) / max(time.monotonic() - self._time, 1e-9)
        figures = {"steps_per_second": rate, "images_per_second": rate * self._batch_size}
        if self._peak is not None:
            figures["model_flop_utilisation"] = rate * self._flops / self._peak
        return figures
