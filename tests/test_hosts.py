"""How processes find each other, and that a lone one is left in peace. Two that train together are in tests/train/test_multi_host.py."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from bitdance_jax import hosts
from bitdance_jax.config import HostsConfig
from bitdance_jax.errors import UserError


VARIABLES = ("JAX_", "SLURM_", "OMPI_", "TPU_", "CUDA_VISIBLE_DEVICES")


@pytest.fixture
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith(VARIABLES):
            monkeypatch.delenv(name)


def python(code: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs it in a process in which JAX has not been used yet."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(VARIABLES)}
    environment = kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])} | variables
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("variables", [{}, {"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0"}], ids=["laptop", "srun"])
def test_a_lone_process_starts_nothing(variables):
    code = "import jax; from bitdance_jax import hosts; assert not hosts.start(); assert not jax.distributed.is_initialized()"
    result = python(code, **variables)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_others_do_not_come():
    code = (
        "from bitdance_jax import hosts; from bitdance_jax.config import HostsConfig; hosts.MEETING_SECONDS = 1;"
        "hosts.start(HostsConfig('127.0.0.1:9', 2, 1))"
    )
    result = python(code)
    assert result.returncode == 2
    assert "error: process 1 has waited 1 s at 127.0.0.1:9 for all the others" in result.stderr
    assert "Traceback" not in result.stderr and "F1" not in result.stderr


@pytest.mark.parametrize(
    ("config", "variables", "complaint"),
    [
        ((), {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "there are 4 processes, and nothing says where process 0 is"),
        ((), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES must be a whole number, got 'two'"),
        (("host", 2, 0), {}, "the coordinator must be HOST:PORT of process 0, got host"),
        (("no.such.host.invalid:1234", 2, 0), {}, "the coordinator's host no.such.host.invalid is not known here"),
    ],
    ids=["Open MPI 5", "not a number", "no port", "unknown host"],
)
def test_what_is_said_of_the_others_is_checked(no_launcher, monkeypatch, config, variables, complaint):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=complaint) as caught:
        hosts.start(HostsConfig(*config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "ids"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, []),
        ({"SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, None),
        ({"SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "0"}, []),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_PER_TASK": "4"}, []),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, None),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2", "JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
    ],
)
def test_the_gpus_of_a_process(no_launcher, monkeypatch, variables, ids):
    """All that it sees if it is the only one on its host, or was given its own; otherwise JAX gives it one (None)."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hosts._local_device_ids() == ids


def test_alone_all_agree():
    assert hosts.on_first(lambda: 7) == 7
    assert hosts.all_agree(True) and not hosts.all_agree(False)
    assert hosts.gather(jnp.arange(3)).tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=r"^no room$"), hosts.together():
        raise UserError("no room")
