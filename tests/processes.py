"""Runs Python commands in processes with fast compilation, alone or as the hosts of one job."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax


QUICK = []
if jax.__version_info__ < (0, 11):  # the first is unknown to later versions
    QUICK += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
"""Flags that make compiling three times as fast. The programs run as fast."""

Command = Sequence[str | os.PathLike[str]]


def environment(devices: int = 1) -> dict[str, str]:
    """The environment of a process with this many CPU devices."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
        "XLA_FLAGS": " ".join([f"--xla_force_host_platform_device_count={devices}", *QUICK]),
    }


def python(command: Command, cwd: Path, devices: int = 1) -> str:
    """The output of a Python command, which must succeed."""
    process = subprocess.run(
        [sys.executable, *command],
        env=environment(devices),
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def start_job(commands: Sequence[Command], cwd: Path, devices: int = 1) -> list[subprocess.Popen]:
    """Starts Python commands as the processes of one job, each with this many devices."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(len(commands))}
    variables = [
        environment(devices) | job | {"JAX_PROCESS_ID": str(number)}
        for number in range(len(commands))
    ]
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(
            [sys.executable, *command], env=own, cwd=cwd, stdout=pipe, stderr=pipe, text=True
        )
        for command, own in zip(commands, variables, strict=True)
    ]
