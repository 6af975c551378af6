"""Traces of a range of steps."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from bitdance_jax.train.profiling import Profile


@jax.jit
def advance(state):
    return jnp.sin(state) + 1


def run(folder, profile, start=0, steps=6):
    state = jnp.zeros((64, 64))
    with Profile(profile, folder, start) as trace:
        for step in range(start + 1, steps + 1):
            trace.before_step(step, state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state = advance(state)


def traced_steps(folder):
    (path,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
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
def test_the_steps_asked_for_are_traced(tmp_path, capsys, profile, start, traced):
    run(tmp_path, profile, start)
    assert traced_steps(tmp_path) == traced
    message = capsys.readouterr().err
    assert (
        f"xprof --logdir {tmp_path}" in message
        and "perfetto_trace.json.gz at https://ui.perfetto.dev" in message
    )


def test_a_run_that_is_past_the_steps_says_so(tmp_path, capsys):
    run(tmp_path, (1, 3), start=3)
    assert capsys.readouterr().err == "no trace is written: the run is past step 3\n"
    assert list(tmp_path.iterdir()) == []


def test_without_a_profile_nothing_is_written(tmp_path, capsys, monkeypatch):
    run(tmp_path, None)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run(tmp_path, (1, 3))
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []
