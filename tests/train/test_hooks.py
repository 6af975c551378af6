"""When hooks are called, in which order, and what they may do."""

import csv

import jax
import numpy as np
import pytest
from PIL import Image

from bitdance_jax.config import MeshConfig
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.errors import ConfigError, Interrupted
from bitdance_jax.io import model_folder
from bitdance_jax.train.hooks import Every, Hook
from bitdance_jax.train.loop import train
from bitdance_jax.train.stopping import StopSignals


class Recording(Hook):
    """Records the calls of all its instances in order."""

    def __init__(self, calls, name, every=1, at_stop=False):
        self.every = every
        self.at_stop = at_stop
        self._calls = calls
        self._name = name

    def start(self, run):
        self._calls.append((self._name, "start", run.start))

    def after_step(self, result):
        self._calls.append((self._name, result.step))

    def close(self):
        self._calls.append((self._name, "close"))


@pytest.fixture
def run(toy, tmp_path):
    """Trains the toy with hooks; saves every 4 steps and writes metrics every 6."""

    def run(hooks, steps=10):
        intervals = {"log_every": 6, "save_every": 4, "preview_every": 100}
        config = toy.training_config(tmp_path, steps, **intervals)
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        train(toy.ToyTask(), config, mesh=mesh, hooks=hooks)
        return tmp_path

    return run


@pytest.mark.parametrize(
    ("hooks", "line"),
    [
        ([print], r"hooks\[0\] must be a Hook, such as Every\(100, function\), got <built-in"),
        ([Hook(), Hook], r"hooks\[1\] must be a Hook, .*, got <class"),
        (Hook(), "hooks must be a list of Hook, got "),
        (3, "hooks must be a list of Hook, got 3"),
        ([type("Zero", (Hook,), {"every": 0})()], r"hooks\[0\]\.every must be positive, got 0"),
        ([type("Text", (Hook,), {"every": "5"})()], r"hooks\[0\]\.every must be int, got '5'"),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_what_is_no_hook(run, tmp_path, hooks, line):
    with pytest.raises(ConfigError, match=f"^{line}") as caught:
        run(hooks)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def rows(workdir):
    with (workdir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_hooks_are_called_in_order_and_all_after_the_last_step(run):
    calls = []
    run([Recording(calls, "a", every=3), Recording(calls, "b", every=5)])
    assert calls == [
        ("a", "start", 0),
        ("b", "start", 0),
        ("a", 3),
        ("b", 5),
        ("a", 6),
        ("a", 9),
        ("a", 10),
        ("b", 10),
        ("b", "close"),
        ("a", "close"),
    ]


def test_a_resumed_run_calls_hooks_after_the_same_steps(run):
    calls = []
    run([Recording(calls, "a", every=3)], steps=5)
    del calls[:]
    run([Recording(calls, "a", every=3)], steps=10)
    assert calls == [("a", "start", 5), ("a", 6), ("a", 9), ("a", 10), ("a", "close")]
    del calls[:]
    run([Recording(calls, "a", every=3)], steps=10)
    assert calls == [("a", "start", 10), ("a", "close")]


def test_a_signal_calls_the_hooks_that_ask_for_it(run, monkeypatch):
    calls = []
    monkeypatch.setattr(StopSignals, "reached", lambda self, step: step == 5)
    with pytest.raises(Interrupted):
        run([Recording(calls, "a", every=2), Recording(calls, "b", every=2, at_stop=True)])
    assert calls[2:] == [
        ("a", 2),
        ("b", 2),
        ("a", 4),
        ("b", 4),
        ("b", 5),
        ("b", "close"),
        ("a", "close"),
    ]


def test_a_hook_gets_the_metrics_of_all_steps_since_the_last_call(run):
    seen = {}
    run([Every(5, lambda result: seen.update({result.step: result}))])
    # The loop's own hooks are called after steps 4, 6, 8 and 10.
    assert [len(seen[step].history) for step in (5, 10)] == [1, 2]
    assert seen[5].metrics == seen[5].history[-1]
    assert seen[10].metrics.items() >= seen[10].history[-1].items()
    assert {"loss", "grad_norm", "learning_rate", "largest_error"} <= seen[5].metrics.keys()


def test_what_a_hook_adds_is_written(run):
    grey = np.full((4, 4, 3), 128, np.uint8)

    def add(result):
        result.log({"half": result.step / 2})
        result.log_images({"grey": grey})

    workdir = run([Every(5, add)])
    assert [(row["step"], row["half"]) for row in rows(workdir)] == [
        ("5", "2.5"),
        ("6", ""),
        ("10", "5.0"),
    ]
    np.testing.assert_array_equal(Image.open(workdir / "images" / "grey_0000005.png"), grey)


def test_a_hook_finishes_the_run(run):
    calls = []
    workdir = run([Every(3, lambda result: result.finish()), Recording(calls, "late", every=100)])
    assert calls == [("late", "start", 0), ("late", 3), ("late", "close")]
    assert [row["step"] for row in rows(workdir)] == ["3"]
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"3"}
    metadata = model_folder.load(workdir / "model").metadata
    assert metadata["steps"] == 3 and metadata["held_out"].keys() == {"norm"}


@pytest.mark.parametrize("every", [0, -1])
def test_a_bad_interval_is_refused(every):
    with pytest.raises(ConfigError, match="every must be"):
        Every(every, print)


def test_an_error_in_a_hook_ends_the_run_without_a_checkpoint(run, tmp_path):
    calls = []

    def fail(result):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        run([Recording(calls, "a", every=100), Every(4, fail)])
    assert calls == [("a", "start", 0), ("a", "close")]
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_run_with_hooks_trains_the_same_model(run, toy, tmp_path):
    run([])
    before = (tmp_path / "metrics.csv").read_bytes()
    weights = model_folder.load(tmp_path / "model").params
    other = toy.training_config(
        tmp_path / "other", 10, log_every=6, save_every=4, preview_every=100
    )
    train(
        toy.ToyTask(),
        other,
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
        hooks=[Every(1, lambda result: result.metrics["loss"])],
    )
    assert (tmp_path / "other" / "metrics.csv").read_bytes() == before
    jax.tree.map(
        np.testing.assert_array_equal,
        model_folder.load(tmp_path / "other" / "model").params,
        weights,
    )
