"""Hooks of your own: early stopping, and metrics as JSON lines.

    python examples/hook.py                                       # a few steps on the emoji
    python examples/hook.py emoji_tokenizer                       # any config, as `bitdance train`

A hook is called after every n steps: a function, or a class if it remembers something.
`bitdance_jax.train.hooks` documents when exactly.
"""

import dataclasses
import json
import math
import sys
import tempfile
from pathlib import Path

import jax

from bitdance_jax.cli import command_line
from bitdance_jax.cli import train as train_command
from bitdance_jax.config import OptimizerConfig, RunConfig, TokenizerConfig
from bitdance_jax.data.config import DataConfig
from bitdance_jax.train import Every, Hook, RunContext, StepResult, TokenizerTraining, train


def write_json_line(result: StepResult) -> None:
    """Prints the metrics of a step, for other programs to read."""
    if jax.process_index() == 0:
        print(json.dumps({"step": result.step, **result.metrics}), flush=True)


class EarlyStopping(Hook):
    """Finishes the run when a held-out metric has not improved in `patience` evaluations.

    The metrics are equal on all processes, so all of them finish after the same step. A run that
    resumes starts to count again.
    """

    def __init__(self, metric: str, patience: int, *, maximize: bool = False) -> None:
        self._metric = metric
        self._patience = patience
        self._sign = -1 if maximize else 1
        self._best = math.inf
        self._failures = 0

    def start(self, run: RunContext) -> None:
        self.every = run.config.run.preview_every  # The interval of held-out metrics.

    def after_step(self, result: StepResult) -> None:
        value = self._sign * result.metrics[self._metric]
        self._failures = 0 if value < self._best else self._failures + 1
        self._best = min(self._best, value)
        if self._failures >= self._patience:
            result.finish()


def get_config() -> TokenizerTraining:
    """At toy size, on the embedded emoji."""
    return TokenizerTraining(
        run=RunConfig(workdir="runs/hooks", steps=40, log_every=2, preview_every=2),
        model=TokenizerConfig(bits=8, ch=32, ch_mult=(1, 1), num_res_blocks=1, num_codebooks=1),
        image_size=16,
        data=DataConfig(batch_size=8),
        # Learns nothing, so that it stops early.
        optimizer=OptimizerConfig(learning_rate=1e-12, end_learning_rate=0.0),
    )


def main() -> None:
    hooks = [Every(2, write_json_line), EarlyStopping("eval_psnr", patience=2, maximize=True)]
    if len(sys.argv) > 1:
        sys.exit(command_line.run(lambda: train_command.main(hooks)))
    config = get_config()
    with tempfile.TemporaryDirectory() as folder:
        run = dataclasses.replace(config.run, workdir=str(Path(folder) / "run"))
        config = dataclasses.replace(config, run=run)
        train(config.make_task(), config, hooks=hooks)


if __name__ == "__main__":
    main()
