"""Two processes that train together, killed, stopped and failed, end as one that runs alone. Real
processes, real signals.

The tests share one run: each resumes it where the previous test stopped.
"""

import csv
import functools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
import pytest

from bitdance_jax.io import model_folder


STEPS = 40
KEEP_COMPILED = {"JAX_ENABLE_COMPILATION_CACHE": "1", "JAX_LOG_COMPILES": "1"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run of one process."""
    workdir = tmp_path_factory.mktemp("alone")
    (process,) = start(workdir, 1)
    assert process.wait(60) == 0, said(workdir, 0)
    return workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("together")


def start(
    workdir: Path,
    count: int,
    launcher: str = "environment",
    seconds_a_step: float = 0.0,
    flags: Sequence[str] = (),
    variables: Mapping[str, str] = MappingProxyType({}),
) -> list[subprocess.Popen]:
    """The processes of one job, as a launcher starts them."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("toy_run.py")),
        str(workdir),
        str(STEPS),
        str(seconds_a_step),
        *flags,
    ]
    job, processes = free_job(), []
    for number in range(count):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            **variables,
        }
        if count > 1:
            environment |= launched(launcher, job, count, number)
        with (workdir / f"{number}.log").open("w") as log:
            processes.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    return processes


def free_job() -> int:
    """The number of a job such that the port that JAX makes of it under Slurm and Open MPI is
    free."""
    while True:
        job = random.randrange(4096)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 61440 + job)) != 0:
                return job


def launched(launcher: str, job: int, count: int, number: int) -> dict[str, str]:
    """What a launcher tells a process."""
    if launcher == "slurm":
        own = {
            "PROCID": number,
            "LOCALID": number,
            "NTASKS": count,
            "JOB_ID": job,
            "STEP_NODELIST": "localhost",
            "STEP_NUM_NODES": 1,
        }
        return {f"SLURM_{name}": str(value) for name, value in own.items()}
    if launcher == "open_mpi":
        own = {"SIZE": count, "RANK": number, "LOCAL_RANK": number, "LOCAL_SIZE": count}
        coordinator = {"OMPI_MCA_orte_hnp_uri": f"{job * 4096}.0;tcp://127.0.0.1:1"}
        return coordinator | {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in own.items()}
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{61440 + job}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
    }


def said(workdir: Path, number: int) -> str:
    return (workdir / f"{number}.log").read_text()


def read(workdir: Path) -> list[dict[str, str]]:
    with (workdir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def wait_until(
    processes: list[subprocess.Popen], workdir: Path, condition: Callable[[], bool]
) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert all(process.poll() is None for process in processes), [
            said(workdir, number) for number in range(len(processes))
        ]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_step(processes: list[subprocess.Popen], workdir: Path, step: int) -> None:
    """Until these processes, and not those before them, which may have come further, have logged a
    step."""
    started, path = time.time(), workdir / "metrics.csv"
    wait_until(
        processes,
        workdir,
        lambda: path.stat().st_mtime > started and int(read(workdir)[-1]["step"]) >= step,
    )


def ends(processes: list[subprocess.Popen], seconds: float) -> list[int]:
    """Exit codes; no process takes longer."""
    deadline = time.monotonic() + seconds
    return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in processes]


def complete(workdir: Path) -> list[int]:
    return sorted(
        int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()
    )


@pytest.mark.parametrize(("victim", "step", "launcher"), [(1, 7, "slurm"), (0, 14, "open_mpi")])
def test_a_killed_process_stops_the_other_with_one_line(workdir, victim, step, launcher):
    processes = start(workdir, 2, launcher, seconds_a_step=0.05)
    wait_until(processes, workdir, (workdir / f"checkpoints/{step}").exists)
    processes[victim].kill()
    assert ends(processes, 20)[1 - victim] == 2
    assert f"error: process {victim} is gone (" in said(workdir, 1 - victim)
    assert "Traceback" not in said(workdir, 1 - victim)


def test_an_error_of_one_process_stops_both_with_its_line(workdir):
    flags = ["--full-at", "20"]
    processes = start(workdir, 2, seconds_a_step=0.05, flags=flags, variables=KEEP_COMPILED)
    assert ends(processes, 60) == [2, 2]
    line = f"the disk of {workdir} is full; free space and run the same command again: it resumes"
    assert f"\nerror: process 1: {line}\n" in said(workdir, 0)
    assert f"\nerror: {line}\n" in said(workdir, 1)
    assert "resuming" in said(workdir, 0) and "resuming" not in said(workdir, 1)


def test_a_stuck_process_stops_both_with_its_line_and_the_stacks_of_both(workdir):
    flags = ["--stuck-at", "25", "--stall-minutes", "0.1"]
    processes = start(workdir, 2, seconds_a_step=0.05, flags=flags)
    assert ends(processes, 90) == [2, 2]
    for number in range(2):
        assert re.search(
            r"\nerror: (process \d: )?step 2[456] is stuck: it has taken 6 s, where the median is "
            r"0\.\d+ s; the stacks of all threads are printed above; ",
            said(workdir, number),
        )
    assert "in read_for_ever\n" in said(workdir, 1)
    assert "in train\n" in said(workdir, 0) and "in read_for_ever\n" not in said(workdir, 0)


def test_a_signal_to_one_process_saves_and_stops_both_at_the_same_step(workdir):
    processes = start(workdir, 2, seconds_a_step=0.3)
    wait_for_step(processes, workdir, 28)  # the run before logged up to 25
    processes[1].send_signal(signal.SIGTERM)
    assert ends(processes, 30) == [128 + signal.SIGTERM] * 2
    last = complete(workdir)[-1]
    assert int(read(workdir)[-1]["step"]) == last < STEPS
    for number in range(2):
        assert (
            f"stopped by SIGTERM to one of the processes; step {last} is saved in {workdir}"
            in said(workdir, number)
        )
        assert "Traceback" not in said(workdir, number)


def test_one_process_goes_on_from_the_checkpoint_of_two(workdir):
    last = complete(workdir)[-1]
    (process,) = start(workdir, 1, seconds_a_step=0.1)
    wait_for_step([process], workdir, last + 3)
    process.send_signal(signal.SIGINT)
    assert ends([process], 30) == [128 + signal.SIGINT]
    assert f"resuming {workdir} after step {last}\n" in said(workdir, 0)
    assert complete(workdir)[-1] >= last + 3


def test_two_go_on_from_that_of_one_and_leave_out_a_damaged_one(alone, workdir):
    last, before = complete(workdir)[-1], complete(workdir)[-2]
    weights = max(
        (workdir / f"checkpoints/{last}/state").rglob("d/*"), key=lambda file: file.stat().st_size
    )
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 3])
    processes = start(workdir, 2, variables=KEEP_COMPILED)
    assert ends(processes, 60) == [0, 0], (said(workdir, 0), said(workdir, 1))
    # On CPUs JAX gives process 1's programs other keys.
    assert "cache hit for 'jit_train_step'" in said(workdir, 0)
    assert f"checkpoint {workdir}/checkpoints/{last} is damaged and skipped" in said(workdir, 0)
    assert f"resuming {workdir} after step {before}\n" in said(workdir, 0)
    assert (
        [row["step"] for row in read(workdir)]
        == [row["step"] for row in read(alone)]
        == [str(step) for step in range(1, STEPS + 1)]
    )
    for name in ("loss", "grad_norm", "largest_error"):
        one, two = (
            np.array([float(row[name]) for row in read(folder)]) for folder in (alone, workdir)
        )
        np.testing.assert_allclose(two, one, rtol=1e-6 if name == "loss" else 1e-5)
    one, two = (model_folder.load(folder / "model").params for folder in (alone, workdir))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), two, one)
