"""Trains a little MLP, as a process that the tests can kill: `python toy_run.py WORKDIR STEPS SECONDS_A_STEP`."""

import sys
import time
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from bitdance_jax.config import OptimizerConfig, RunConfig
from bitdance_jax.errors import UserError
from bitdance_jax.train.checkpoint import quiet_orbax
from bitdance_jax.train.loop import Interrupted, train
from bitdance_jax.train.task import Batch, Batches, Params


class ToyTask:
    """Regression of a fixed function with a noisy loss: it shows any slip of the data's order or of the noise."""

    steps_per_epoch = 5.0

    def __init__(self, seconds_a_step: float = 0.0, width: int = 16) -> None:
        self._seconds, self._width = seconds_a_step, width

    def init(self, key: jax.Array) -> Params:
        first, second = jax.random.split(key)
        shape = (8, self._width)
        return {
            "hidden": {"kernel": jax.random.normal(first, shape), "bias": jnp.zeros(self._width)},
            "out": {"kernel": jax.random.normal(second, (self._width, 1))},
        }

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
        hidden = jax.nn.gelu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        error = (hidden @ params["out"]["kernel"])[:, 0] - jnp.sin(batch["x"].sum(-1))
        return (error**2).mean(), {"largest_error": jnp.abs(error).max()}

    def no_decay(self, path: tuple[str, ...]) -> bool:
        return path == ("out", "kernel")

    def stacked_axes(self, path: tuple[str, ...]) -> int:
        return 0

    def preview(self, ema_params: Params, step: int) -> dict[str, np.ndarray]:
        grey = np.clip(np.asarray(ema_params["hidden"]["kernel"]) * 50 + 128, 0, 255).astype(np.uint8)
        return {"kernel": np.repeat(grey[..., None], 3, -1)}

    def evaluate(self, ema_params: Params) -> dict[str, float]:
        return {"norm": float(jnp.linalg.norm(ema_params["out"]["kernel"]))}

    def export(self, ema_params: Params, folder: str) -> None:
        np.savez(folder, **{"/".join(k.key for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(ema_params)})

    def batches(self) -> Batches:
        rows = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)

        def record(row: Any) -> dict[str, np.ndarray]:
            time.sleep(self._seconds / 8)
            return {"x": row}

        return iter(grain.MapDataset.source(rows).seed(1).shuffle().repeat().map(record).batch(8).to_iter_dataset())


OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=10, schedule="cosine", ema_decay=0.9)


def run_config(workdir: str, steps: int) -> RunConfig:
    return RunConfig(workdir=workdir, steps=steps, log_every=1, save_every=7, preview_every=20)


def main() -> int:
    workdir, steps, seconds_a_step = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    quiet_orbax()
    try:
        train(ToyTask(seconds_a_step), run_config(workdir, steps), OPTIMIZER)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
