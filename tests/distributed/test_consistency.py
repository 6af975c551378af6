"""Processes that were told different things say so before they begin."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from bitdance_jax.config import HostsConfig, OptimizerConfig, RunConfig
from bitdance_jax.data.config import DataConfig
from bitdance_jax.distributed import consistency
from bitdance_jax.distributed.consistency import check_same_config
from bitdance_jax.errors import UserError
from bitdance_jax.train.task import TrainingConfig


CONFIG = TrainingConfig(
    run=RunConfig("runs/a", 100), data=DataConfig("folder", "images", workers=2)
)


@pytest.fixture
def other(monkeypatch):
    """Sets what process 1 says."""
    said = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        consistency, "_exchange", lambda facts: said.append(facts) or [said[0], said[-1]]
    )
    check_same_config(CONFIG, frozen_weights=consistency.fingerprint({"a": np.arange(3)}))
    return said


@pytest.mark.parametrize(
    ("config", "differences"),
    [
        (
            TrainingConfig(
                run=RunConfig("runs/a", 100), data=DataConfig("folder", "images", batch_size=8)
            ),
            "data.batch_size is 32 and 8",
        ),
        (
            TrainingConfig(
                run=RunConfig("runs/a", 100),
                data=CONFIG.data,
                optimizer=OptimizerConfig(learning_rate=0.5, ema_decay=0.0),
            ),
            "optimizer.ema_decay is 0.9999 and 0.0; optimizer.learning_rate is 0.0006 and 0.5",
        ),
        (
            TrainingConfig(run=RunConfig("runs/a", 100, checkpoints="elsewhere"), data=CONFIG.data),
            'run.checkpoints is null and "given"',
        ),
    ],
)
def test_fields_that_differ_are_named(other, config, differences):
    with pytest.raises(UserError) as caught:
        check_same_config(config, frozen_weights=consistency.fingerprint({"a": np.arange(3)}))
    assert (
        str(caught.value)
        == f"processes 0 and 1 were told different things ({differences}); start all with the same command"
    )


def test_other_frozen_weights(other):
    with pytest.raises(UserError, match="frozen_weights is "):
        check_same_config(CONFIG, frozen_weights=consistency.fingerprint({"a": np.arange(1, 4)}))


def test_places_and_loaders_may_differ(other):
    config = TrainingConfig(
        run=RunConfig("/mnt/a", 100),
        data=DataConfig("folder", "/scratch/images", workers=8),
        hosts=HostsConfig("localhost:1", 2, 1),
    )
    check_same_config(config, frozen_weights=consistency.fingerprint({"a": np.arange(3)}))


PROCESS = """
import sys
from bitdance_jax.config import HostsConfig
from bitdance_jax.distributed import multihost
from bitdance_jax.distributed.consistency import check_same
from bitdance_jax.cli.command_line import run
def main():
    number = int(sys.argv[2])
    multihost.initialize(HostsConfig(sys.argv[1], 2, number))
    with multihost.stop_all_on_error():
        check_same({"seed": 1, "prompts": ["a", "ü"]})
        check_same({"seed": number, **({"only": 1.5} if number else {})})
sys.exit(run(main))
"""


@pytest.mark.slow
def test_two_processes_behind_a_proxy_end_with_the_difference():
    """JAX asks the proxy for the coordinator where nothing is done about it, and waits for ever."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    own = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "http_proxy": "http://127.0.0.1:9",
    }
    commands = [[sys.executable, "-c", PROCESS, address, str(number)] for number in range(2)]
    processes = [
        subprocess.Popen(
            c, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for c in commands
    ]
    outputs = [process.communicate(timeout=90)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    for output in outputs:
        assert (
            "error: " in output
            and output.count(
                "processes 0 and 1 were told different things (only is None and 1.5; seed is 0 and 1)"
            )
            == 1
        )
        assert "Traceback" not in output
