"""A run that is killed or stopped, and started again, ends as if nothing had happened. Real
processes, real signals."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from bitdance_jax.io import model_folder


STEPS = 60


def start(
    workdir: Path, seconds_a_step: float = 0.0, flags: Sequence[str] = (), **variables: str
) -> subprocess.Popen[str]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        **variables,
    }
    command = [
        sys.executable,
        str(Path(__file__).with_name("toy_run.py")),
        workdir.name,
        str(STEPS),
        str(seconds_a_step),
        *flags,
    ]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=workdir.parent,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Some tests signal the process with its workers.
    )


def finish(process: subprocess.Popen[str]) -> str:
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 0, messages
    return messages


def rows(workdir: Path) -> int:
    path = workdir / "metrics.csv"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_row(process: subprocess.Popen[str], workdir: Path, row: int) -> None:
    deadline = time.monotonic() + 120
    while rows(workdir) <= row:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_same_run(first: Path, second: Path) -> None:
    assert (first / "metrics.csv").read_bytes() == (second / "metrics.csv").read_bytes()
    one, other = (model_folder.load(workdir / "model").params for workdir in (first, second))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert images(first) == images(second)


def images(workdir: Path) -> dict[str, bytes]:
    """Of every image of a run, its bytes; also of what a kill left of one."""
    files = [
        path
        for folder in (workdir, workdir / "images")
        for path in folder.iterdir()
        if path.is_file()
    ]
    return {
        path.name: path.read_bytes()
        for path in files
        if path.name not in ("config.json", "metrics.csv")
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    finish(start(workdir))
    assert rows(workdir) == STEPS + 1
    return workdir


@pytest.fixture
def workdir(tmp_path) -> Path:
    """Of the same name as the uninterrupted run's, which the images' metadata has."""
    return tmp_path / "run"


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_the_same_losses_and_weights(uninterrupted, workdir):
    moments = random.Random(0)
    for _ in range(3):
        process = start(workdir, seconds_a_step=0.02)
        wait_for_row(process, workdir, min(rows(workdir), STEPS - 20))
        time.sleep(moments.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    for name in (".bitdance_jax.0123456789abcdef", "images/.bitdance_jax.89abcdef01234567"):
        (workdir / name).parent.mkdir(exist_ok=True)
        (workdir / name).touch()  # as after a kill during a preview
    finish(start(workdir))
    assert_same_run(uninterrupted, workdir)


@pytest.mark.slow
def test_a_signal_saves_and_a_message_says_how_to_resume(uninterrupted, workdir):
    """One signal after the other stops the same run."""
    resumed = ""
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(workdir, seconds_a_step=0.02)
        wait_for_row(process, workdir, rows(workdir) + 10)
        process.send_signal(number)
        _, messages = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert resumed in messages
        assert f"stopped by {number.name}; step" in messages
        assert "Traceback" not in messages
        last = int((workdir / "metrics.csv").read_text().splitlines()[-1].split(",")[0])
        resumed = f"after step {last}\n"
    assert resumed in finish(start(workdir))
    assert_same_run(uninterrupted, workdir)


@pytest.mark.slow
def test_a_signal_to_the_workers_too_saves_as_without_workers(uninterrupted, workdir):
    flags = ["--workers", "2"]
    process = start(workdir, seconds_a_step=0.02, flags=flags)
    wait_for_row(process, workdir, 10)
    os.killpg(process.pid, signal.SIGTERM)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; step" in messages.splitlines()[-1]
    assert "Traceback" not in messages
    finish(start(workdir, flags=flags))
    assert_same_run(uninterrupted, workdir)


@pytest.mark.slow
def test_a_second_start_loads_compiled_programs_and_computes_the_same(uninterrupted, workdir):
    variables = {"JAX_ENABLE_COMPILATION_CACHE": "1", "JAX_LOG_COMPILES": "1"}
    variables |= {"JAX_EXPLAIN_CACHE_MISSES": "1"}
    process = start(workdir, seconds_a_step=0.02, **variables)
    wait_for_row(process, workdir, 25)  # after an evaluation and a preview
    process.send_signal(signal.SIGTERM)
    _, first = process.communicate(timeout=60)
    second = finish(start(workdir, **variables))
    steps = {"jit_train_step", "jit_evaluation_step"}
    assert steps <= programs("MISS", first) and steps <= programs("hit", second)
    assert programs("MISS", second) <= {"jit__identity"}  # moves what is restored
    assert_same_run(uninterrupted, workdir)


def programs(outcome: str, messages: str) -> set[str]:
    """The names of those that JAX looked for in the cache, with this outcome."""
    return set(re.findall(rf"(?i:cache) {outcome} for '(\w+)'", messages))


@pytest.mark.slow
def test_a_stuck_run_ends_with_the_stacks_of_its_threads(workdir):
    """The time for which the process is suspended does not count."""
    flags = ["--stuck-at", "20", "--stall-minutes", "0.05"]
    process = start(workdir, seconds_a_step=0.02, flags=flags)
    wait_for_row(process, workdir, 5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 2
    assert " in read_for_ever\n" in messages
    assert messages.splitlines()[-1].startswith("error: step 20 is stuck: it has taken 3 s, where ")


@pytest.mark.slow
def test_a_finished_run_started_again_only_exports(uninterrupted, tmp_path):
    before = (uninterrupted / "metrics.csv").read_bytes()
    (uninterrupted / "model").rename(tmp_path / "model")
    assert f"after step {STEPS}\n" in finish(start(uninterrupted))
    assert (uninterrupted / "metrics.csv").read_bytes() == before
    assert (uninterrupted / "model/config.json").exists()
