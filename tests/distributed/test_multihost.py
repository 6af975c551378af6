"""One process without others. tests/train/test_multi_host.py has two that train together."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from bitdance_jax.distributed import multihost
from bitdance_jax.errors import UserError


VARIABLES = ("JAX_", "SLURM_", "OMPI_", "TPU_", "CUDA_VISIBLE_DEVICES")


ALONE = """
import os
import jax
from bitdance_jax.distributed import multihost
for variables in ({}, {"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0"}):
    os.environ.update(variables)
    assert not multihost.initialize(), variables
    assert not jax.distributed.is_initialized(), variables
"""


def test_a_process_alone_starts_nothing():
    """On a laptop, and as the only process of srun."""
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(VARIABLES)
    }
    variables |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-c", ALONE], env=variables, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_collectives_of_one_process():
    assert multihost.on_process_0(lambda: 7) == 7
    assert multihost.all_true(True)
    assert not multihost.all_true(False)
    assert multihost.gather(jnp.arange(3)).tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=r"^no space$"), multihost.stop_all_on_error():
        raise UserError("no space")


def test_process_0_alone_enters(monkeypatch):
    events = []

    @contextlib.contextmanager
    def context():
        events.append("entered")
        yield
        events.append("left")

    with multihost.entered_on_process_0(context()):
        assert events == ["entered"]
    assert events == ["entered", "left"]
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with multihost.entered_on_process_0(context()):
        pass
    assert events == ["entered", "left"]
