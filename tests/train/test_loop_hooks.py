"""What the loop's hooks fetch, check, write and save."""

import csv
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.errors import UserError
from bitdance_jax.io.model_lookup import RunRecord
from bitdance_jax.io.progress import Progress
from bitdance_jax.train import loop_hooks as loop_hooks_module
from bitdance_jax.train.checkpoint import Checkpoints
from bitdance_jax.train.hooks import HookRunner, RunContext
from bitdance_jax.train.loop_hooks import EvaluationHook, loop_hooks
from bitdance_jax.train.state import TrainState


MESH = make_mesh(devices=jax.devices()[:1])


class SavedSteps(Checkpoints):
    """Records the steps that are saved, and saves nothing."""

    steps = None

    def __init__(self):
        self.steps = []

    def save(self, step, state, iterator_state):
        assert iterator_state == {"next_batch": step}
        self.steps.append(step)

    def wait(self):
        pass


class FixedEvaluation:
    def metrics(self, params):
        return {"score": 0.5}

    def close(self):
        pass


class FixedEvaluationHook(EvaluationHook):
    """Evaluates without parameters."""

    def start(self, run):
        super().start(run)
        self._evaluation = FixedEvaluation()


@pytest.fixture
def record(toy, tmp_path, monkeypatch):
    """Calls the loop's hooks for steps with the given losses; returns the steps that were saved."""
    intervals = {"log_every": 8, "save_every": 20, "preview_every": 40}
    task, checkpoints = toy.ToyTask(), SavedSteps()
    monkeypatch.setattr(loop_hooks_module, "peak_flops", lambda mesh: 1e12)
    monkeypatch.setattr(task, "preview", lambda *_: {"image": np.zeros((4, 4, 3), np.uint8)})

    def run(losses, start=0, stop_at=None, hooks=(), **changes):
        config = toy.training_config(tmp_path, 40, **(intervals | changes))
        shown = jax.process_index() == 0
        progress = Progress(40, "step", "training", initial=start, shown=shown)
        context = RunContext(task, config, MESH, {}, start, progress)
        all_hooks = loop_hooks(
            context,
            checkpoints=checkpoints,
            evaluation=FixedEvaluationHook(config.run.preview_every),
            hooks=hooks,
        )
        state = TrainState(jnp.int32(0), {}, {}, None)
        try:
            with HookRunner(all_hooks, context) as runner:
                for step, loss in enumerate(losses, start=start + 1):
                    runner.before_step(step, state)
                    metrics = {"loss": jnp.float32(loss), "grad_norm": jnp.float32(1.0)}
                    last = runner.after_step(
                        step,
                        state,
                        metrics,
                        iterator_state={"next_batch": step},
                        stopping=step == stop_at,
                    )
                    if last:
                        break
        finally:
            progress.close()
        return checkpoints.steps

    return run


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_rows_and_checkpoints_come_at_their_intervals(record, tmp_path):
    losses = np.linspace(1, 0.5, 40, dtype=np.float32)
    assert record(losses) == [20, 40]
    assert [int(row["step"]) for row in rows(tmp_path)] == [8, 16, 24, 32, 40]
    assert [float(row["loss"]) for row in rows(tmp_path)] == [
        float(losses[step - 1]) for step in (8, 16, 24, 32, 40)
    ]
    assert rows(tmp_path)[-1]["eval_score"] == "0.5"
    assert (tmp_path / "images" / "image_0000040.png").exists()


def test_a_resumed_run_writes_the_same_rows(record, tmp_path):
    losses = np.linspace(1, 0.5, 40)
    record(losses)
    uninterrupted = (tmp_path / "metrics.csv").read_bytes()
    assert record(losses[:13], stop_at=13)[-1] == 13  # In the middle of an interval.
    record(losses[13:], start=13)
    assert (tmp_path / "metrics.csv").read_bytes() == uninterrupted


def test_the_step_that_went_wrong_is_named_and_nothing_after_it_is_saved(record, tmp_path):
    losses = np.ones(40)
    losses[26] = np.nan  # In an interval of the log, which ends at step 32.
    with pytest.raises(UserError, match=r"^loss is nan at step 27 .* of step 20\)"):
        record(losses)
    assert [int(row["step"]) for row in rows(tmp_path)] == [8, 16, 24]


def test_a_spike_stops_the_run_even_where_the_next_losses_are_fine(record):
    losses = np.ones(40)
    losses[37] = 9.0
    with pytest.raises(UserError, match=r"^loss is 9, far above .*run\.spike.* at step 38 \("):
        record(losses)
    assert record(losses, spike=None)[-1] == 40


def test_a_signal_does_not_save_a_state_that_diverged(record):
    with pytest.raises(UserError, match=r"at step 2 \(nothing is saved yet\)"):
        record([1.0, np.inf, 1.0], stop_at=3)


def test_nothing_is_fetched_between_intervals(record, monkeypatch):
    fetched, fetch = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(len(tree)) or fetch(tree))
    record(np.ones(40))
    assert fetched == [8, 8, 4, 4, 8, 8]  # Logs every 8 steps, saves every 20.


def test_only_process_0_writes(record, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert record(np.ones(40)) == [20, 40]  # Each process writes its part of a checkpoint.
    assert list(tmp_path.iterdir()) == []


def test_the_progress_bar_shows_metrics_and_what_is_done(record, capfd):
    record(np.ones(40))
    shown = capfd.readouterr().err
    last = shown.splitlines()[-1]
    assert all(text in last for text in ("40/40", "loss 1, gradient 1, ", " images/s, ", "% MFU"))
    states = [state for state in re.findall(r"(?:^|\r)(\w+): ", shown) if state != "training"]
    assert [state for state, _ in itertools.groupby(states)] == [
        "compiling",
        "saving",
        "evaluating",
        "previewing",
        "saving",
    ]


def test_previews_say_how_they_were_made(record, toy, tmp_path, monkeypatch):
    made = {"kind": "class_conditional", "config": {}, "metadata": {"sampler": {"head_steps": 7}}}
    monkeypatch.setattr(toy.ToyTask, "record", RunRecord(**made))
    record([1.0] * 40)
    with Image.open(tmp_path / "images" / "image_0000040.png") as image:
        text = dict(image.info)
    expected = {"model": str(tmp_path), "step": "40", "seed": "0", "head_steps": "7"}
    assert text == expected
