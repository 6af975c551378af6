"""The job of a process, from flags, environment variables and launchers."""

import os

import pytest

from bitdance_jax.config import HostsConfig
from bitdance_jax.distributed import launcher
from bitdance_jax.distributed.job import Job
from bitdance_jax.errors import ConfigError, UserError


VARIABLES = ("JAX_", "SLURM_", "OMPI_", "TPU_", "CUDA_VISIBLE_DEVICES")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith(VARIABLES):
            monkeypatch.delenv(name)


def set_all(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


SRUN = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NODELIST": "node[007-010]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}
MPIRUN = {
    "OMPI_MCA_orte_hnp_uri": "40960.0;tcp://127.0.0.1:1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
NAMED = {
    "JAX_COORDINATOR_ADDRESS": "localhost:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "2",
}


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({}, None),
        (NAMED, Job("localhost", 1234, 4, 2)),
        (NAMED | {"JAX_NUM_PROCESSES": "1"}, None),
        (MPIRUN, Job("127.0.0.1", 61450, 2, 1)),
        (SRUN | NAMED, Job("localhost", 1234, 4, 2)),
        (SRUN | {"SLURM_STEP_NODELIST": "localhost"}, Job("localhost", 62344, 4, 3)),
        (SRUN | {"SLURM_NTASKS": "1"}, None),
    ],
    ids=[
        "laptop",
        "variables",
        "one process",
        "mpirun",
        "variables under srun",
        "srun",
        "srun of one process",
    ],
)
def test_the_job_of_a_process(monkeypatch, variables, job):
    set_all(monkeypatch, variables)
    hint = "JAX's private ClusterEnv changed: adapt launcher._detect to jax/_src/distributed.py"
    assert launcher.find_job(HostsConfig()) == job, hint


def test_flags_override_variables(monkeypatch):
    set_all(monkeypatch, SRUN)
    assert launcher.find_job(HostsConfig("[::1]:1234", 3, 1)) == Job("::1", 1234, 3, 1)


@pytest.mark.parametrize(
    ("config", "variables", "named"),
    [
        (
            (),
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"},
            "4 processes.* JAX_COORDINATOR_ADDRESS",
        ),
        ((), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES .*'two'"),
        ((), {"JAX_COORDINATOR_ADDRESS": "localhost:1234"}, "JAX_PROCESS_ID"),
        ((), NAMED | {"JAX_PROCESS_ID": "4"}, "from 0 to 3, got 4"),
        ((), SRUN | {"SLURM_NTASKS": "many"}, "other processes .*'many'"),
        (("host", 2, 0), {}, "HOST:PORT .*got host"),
        (("localhost:0", 2, 0), {}, "HOST:PORT .*got localhost:0"),
        (("no.such.host.invalid:1234", 2, 0), {}, "no.such.host.invalid"),
    ],
    ids=[
        "Open MPI 5",
        "not an integer",
        "no id",
        "id too large",
        "Slurm",
        "no port",
        "port 0",
        "unknown host",
    ],
)
def test_incomplete_or_wrong_settings(monkeypatch, config, variables, named):
    set_all(monkeypatch, variables)
    with pytest.raises(UserError, match=named) as caught:
        launcher.find_job(HostsConfig(*config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        ("localhost:1", 2, 2),
        ("localhost:1", 0, 0),
        ("localhost:1", 2, -1),
        ("localhost:1", None, None),
    ],
)
def test_inconsistent_flags(config):
    with pytest.raises(ConfigError, match=r"num_processes|process_id"):
        HostsConfig(*config)


@pytest.mark.parametrize(
    ("variables", "ids"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, []),
        (
            {
                "SLURM_NTASKS": "16",
                "SLURM_STEP_NUM_NODES": "2",
                "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
            },
            None,
        ),
        ({"SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "0"}, []),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_PER_TASK": "4"}, []),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, None),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2", "JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
    ],
)
def test_the_gpus_of_a_process(monkeypatch, variables, ids):
    """All that it sees if it is alone on its host or sees only its own; else JAX chooses."""
    set_all(monkeypatch, variables)
    assert launcher.local_device_ids() == ids
