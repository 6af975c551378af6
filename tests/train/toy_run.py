"""Trains a little MLP, as processes that the tests can kill: `python toy_run.py WORKDIR STEPS
SECONDS_A_STEP [FLAGS]`.

Several of them find each other as those of train.py do. With
JAX_ENABLE_COMPILATION_CACHE=1 they keep compiled programs in WORKDIR_compiled.
"""

import argparse
import errno
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bitdance_jax.cli.command_line import run
from bitdance_jax.cli.compilation_cache import keep_compiled
from bitdance_jax.config import MeshConfig, OptimizerConfig, RunConfig
from bitdance_jax.data.config import DataConfig
from bitdance_jax.data.packed_batches import SampleReader
from bitdance_jax.distributed import multihost
from bitdance_jax.errors import Interrupted
from bitdance_jax.io import model_folder
from bitdance_jax.io.model_lookup import RunRecord
from bitdance_jax.train.loop import train
from bitdance_jax.train.task import Batch, Objective, Params, TrainingConfig


ROWS, BATCH = 40, 8


class ToyObjective(Objective):
    """Regression of a fixed function with a noisy loss: it shows any slip of the data's order or of
    the noise."""

    def __init__(self, width: int) -> None:
        self._width = width

    def init(self, key: jax.Array) -> Params:
        first, second = jax.random.split(key)
        return {
            "fc1": {
                "kernel": jax.random.normal(first, (8, self._width)),
                "bias": jnp.zeros(self._width),
            },
            "fc2": {"kernel": jax.random.normal(second, (self._width, 1)) / self._width**0.5},
        }

    def loss(
        self, params: Params, frozen: Params, batch: Batch, keys: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = batch["x"] + 0.1 * jax.vmap(lambda key: jax.random.normal(key, (8,)))(keys)
        hidden = jax.nn.gelu(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
        error = (hidden @ params["fc2"]["kernel"])[:, 0] - jnp.sin(batch["x"].sum(-1))
        return (error**2).mean(), {"largest_error": jnp.abs(error).max()}

    def evaluate(
        self, params: Params, frozen: Params, batch: Batch, keys: jax.Array
    ) -> dict[str, jax.Array]:
        return {"norm": jnp.linalg.norm(params["fc2"]["kernel"])}

    def no_decay(self, path: tuple[str, ...]) -> bool:
        return path == ("fc2", "kernel")

    def abstract_batch(self, batch_size: int) -> Batch:
        return {"x": jax.ShapeDtypeStruct((batch_size, 8), jnp.float32)}


class ToySamples:
    def __init__(self) -> None:
        self._x = np.random.default_rng(0).normal(size=(ROWS, 8)).astype(np.float32)

    def draw(self, n: int) -> np.ndarray:
        return self._x[n]


class ToyBatches:
    """The same 40 rows, in another order in each epoch."""

    def __init__(
        self,
        rows: np.ndarray,
        seconds: float = 0.0,
        full_at: int | None = None,
        stuck_at: int | None = None,
        workers: int = 0,
    ) -> None:
        self._rows, self._seconds, self._next = rows, seconds, 0
        self._full_at, self._stuck_at = full_at, stuck_at
        self._reader = SampleReader(ToySamples(), workers)

    def __iter__(self) -> "ToyBatches":
        return self

    def __next__(self) -> Batch:
        time.sleep(self._seconds)
        in_last = jax.process_index() == jax.process_count() - 1
        if self._next == self._full_at and in_last:
            raise OSError(errno.ENOSPC, "No space left on device")
        if self._next == self._stuck_at and in_last:
            read_for_ever()
        epoch, batch = divmod(self._next, ROWS // BATCH)
        order = np.random.default_rng(epoch).permutation(ROWS)[batch * BATCH :][:BATCH]
        self._next += 1
        return {"x": np.stack([self._reader.read(int(n)) for n in order[self._rows]])}

    def get_state(self) -> dict[str, int]:
        return {"next_batch": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self._next = state["next_batch"]

    def close(self) -> None:
        self._reader.close()


def read_for_ever() -> None:
    time.sleep(3600)


class ToyTask:
    frozen: Params = {}  # noqa: RUF012
    batch_size = held_out_size = BATCH
    steps_per_epoch = ROWS / BATCH
    previews_on_mesh = False

    def __init__(
        self,
        seconds_a_step: float = 0.0,
        width: int = 16,
        full_at: int | None = None,
        stuck_at: int | None = None,
        workers: int = 0,
    ) -> None:
        self.objective = ToyObjective(width)
        self._options = seconds_a_step, full_at, stuck_at, workers

    def batches(self, rows: np.ndarray) -> ToyBatches:
        return ToyBatches(rows, *self._options)

    def held_out(self, rows: np.ndarray) -> ToyBatches:
        return ToyBatches(rows)

    @property
    def record(self) -> RunRecord:
        return RunRecord("tokenizer", {}, {})

    def preview(self, ema_params: Params, step: int) -> dict[str, np.ndarray]:
        grey = np.clip(np.asarray(ema_params["fc1"]["kernel"]) * 50 + 128, 0, 255).astype(np.uint8)
        return {"kernel": np.repeat(grey[..., None], 3, -1)}

    def export(
        self, ema_params: Params, folder: str, *, step: int, metrics: dict[str, float]
    ) -> None:
        metadata = {"steps": step, "held_out": metrics}
        model_folder.save(
            folder, kind="tokenizer", config={}, params=ema_params, metadata=metadata, force=True
        )


def training_config(workdir: Path | str, steps: int, **run_changes: object) -> TrainingConfig:
    """Saves every 7 steps. The weights are sharded over all devices."""
    run_config = RunConfig(
        **{
            "workdir": str(workdir),
            "steps": steps,
            "log_every": 1,
            "save_every": 7,
            "preview_every": 20,
        }
        | run_changes
    )
    optimizer = OptimizerConfig(
        learning_rate=1e-3, warmup_steps=10, schedule="cosine", ema_decay=0.9
    )
    return TrainingConfig(
        run=run_config,
        data=DataConfig(batch_size=BATCH),
        optimizer=optimizer,
        mesh=MeshConfig(data=1, fsdp=-1),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("steps", type=int)
    parser.add_argument("seconds_a_step", type=float)
    parser.add_argument(
        "--full-at", type=int, help="batch at which the last process's disk is full"
    )
    parser.add_argument("--stuck-at", type=int, help="batch that the last process never gets")
    parser.add_argument("--stall-minutes", type=float)
    parser.add_argument("--workers", type=int, default=0)
    flags = parser.parse_args()
    multihost.initialize()
    config = training_config(flags.workdir, flags.steps, stall_minutes=flags.stall_minutes)
    task = ToyTask(
        flags.seconds_a_step,
        width=512,
        full_at=flags.full_at,
        stuck_at=flags.stuck_at,
        workers=flags.workers,
    )
    with multihost.stop_all_on_error():
        if os.environ.get("JAX_ENABLE_COMPILATION_CACHE") == "1":
            keep_compiled(f"{flags.workdir}_compiled")
        train(task, config)


if __name__ == "__main__":
    try:
        sys.exit(run(main))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
