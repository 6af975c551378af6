"""A command on two processes with CPU devices of their own, as on two hosts."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


QUICK = ("xla_backend_optimization_level=0", "xla_cpu_use_fusion_emitters=false")
"""What takes a small program less time to compile, and costs it little."""


def start(commands: Sequence[Sequence[str | os.PathLike[str]]], cwd: Path, devices: int = 1) -> list[subprocess.Popen]:
    """Starts each Python command in a process of its own, all of one job, each with so many devices."""
    flags = (f"xla_force_host_platform_device_count={devices}", *QUICK)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    variables = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "XLA_FLAGS": " ".join(f"--{flag}" for flag in flags),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(len(commands)),
    }
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | variables | {"JAX_PROCESS_ID": str(number)},
            cwd=cwd,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        for number, command in enumerate(commands)
    ]
