"""The batch script of docs/multi_host.md, with commands in place of Slurm's."""

import os
import re
import subprocess
from pathlib import Path

import pytest


PAGE = Path(__file__).parents[2] / "docs" / "multi_host.md"
SCRIPT = re.search(r"```bash\n(#!/bin/bash\n#SBATCH.*?)^```", PAGE.read_text(), re.S | re.M)


@pytest.mark.parametrize(
    ("status", "saved", "requeued"),
    [
        (0, True, False),
        (143, True, True),
        (143, False, True),
        (2, True, True),
        (2, False, False),
        (137, True, True),
    ],
)
def test_it_requeues_what_can_go_on(tmp_path, status, saved, requeued):
    commands = {
        "srun": f"mkdir -p h_1x/checkpoints/{200 if saved else 100}; exit {status}",
        "scontrol": "echo $* >> requeued",
    }
    for name, line in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "h_1x" / "checkpoints" / "100").mkdir(parents=True)
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SCRATCH": str(tmp_path),
        "SLURM_JOB_ID": "7",
    }
    assert SCRIPT is not None
    ended = subprocess.run(["bash", "-c", SCRIPT[1]], cwd=tmp_path, env=env, check=False)
    assert ended.returncode == status
    assert (tmp_path / "requeued").exists() == requeued
