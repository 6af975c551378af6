"""Traces of a range of steps."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.io.progress import Progress
from bitdance_jax.train.hooks import HookRunner, RunContext
from bitdance_jax.train.profiling import ProfileHook
from bitdance_jax.train.state import TrainState


@jax.jit
def advance(state):
    return jnp.sin(state) + 1


@pytest.fixture
def run(toy, tmp_path):
    """Takes steps with the hook."""

    def run(profile, start=0, steps=6):
        config = toy.training_config(tmp_path, steps)
        progress = Progress(steps, "step", "training", shown=False)
        context = RunContext(toy.ToyTask(), config, make_mesh(), {}, start, progress)
        state = TrainState(jnp.zeros((64, 64)), {}, {}, None)
        with HookRunner([ProfileHook(profile)], context) as runner:
            for step in range(start + 1, steps + 1):
                runner.before_step(step, state)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state = state.replace(step=advance(state.step))

    return run


def traced_steps(folder):
    (path,) = folder.glob("profile/plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted(
        int(event["args"]["step_num"])
        for event in events
        if event.get("name", "").startswith("train")
    )


@pytest.mark.parametrize(
    ("profile", "start", "traced"),
    [((3, 4), 0, [3, 4]), ((2, 5), 3, [4, 5]), ((5, 9), 0, [5, 6])],
    ids=["in_the_middle", "resumed_within", "cut_short_by_the_end"],
)
def test_the_requested_steps_are_traced(run, tmp_path, capsys, profile, start, traced):
    run(profile, start)
    assert traced_steps(tmp_path) == traced
    message = capsys.readouterr().err
    assert (
        f"xprof --logdir {tmp_path}/profile" in message
        and "perfetto_trace.json.gz at https://ui.perfetto.dev" in message
    )


def test_a_run_that_is_past_the_steps_says_so(run, tmp_path, capsys):
    run((1, 3), start=3)
    assert capsys.readouterr().err == "no trace is written: the run is past step 3\n"
    assert list(tmp_path.iterdir()) == []


def test_without_a_profile_nothing_is_written(run, tmp_path, capsys, monkeypatch):
    run(None)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run((1, 3))
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []
