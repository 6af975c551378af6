"""Processes that were started differently end with an error before they begin."""

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
from bitdance_jax.distributed.consistency import check_same_config, fingerprint
from bitdance_jax.errors import UserError
from bitdance_jax.train.task import TrainingConfig


CONFIG = TrainingConfig(
    run=RunConfig("runs/a", 100), data=DataConfig("folder", "images", workers=2)
)


@pytest.fixture(autouse=True)
def first(monkeypatch):
    """Process 0 was started with CONFIG; the next values are those of process 1."""
    gathered = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        consistency, "_gather", lambda values: gathered.append(values) or [gathered[0], values]
    )
    check_same_config(CONFIG, frozen_weights=fingerprint({"a": np.arange(3)}))


@pytest.mark.parametrize(
    ("data", "other", "differences"),
    [
        (DataConfig("folder", "images", batch_size=8), {}, "(data.batch_size is 32 and 8)"),
        (
            CONFIG.data,
            {"optimizer": OptimizerConfig(learning_rate=0.5, ema_decay=0.0)},
            "(optimizer.ema_decay is 0.9999 and 0.0; optimizer.learning_rate is 0.0006 and 0.5)",
        ),
        (
            CONFIG.data,
            {"run": RunConfig("runs/a", 100, checkpoints="elsewhere")},
            '(run.checkpoints is null and "given")',
        ),
    ],
    ids=["a field", "two fields", "a path that one has"],
)
def test_fields_that_differ_are_named(data, other, differences):
    config = TrainingConfig(**{"run": CONFIG.run, "data": data} | other)
    with pytest.raises(UserError) as caught:
        check_same_config(config, frozen_weights=fingerprint({"a": np.arange(3)}))
    assert differences in str(caught.value)


def test_other_frozen_weights():
    with pytest.raises(UserError, match="frozen_weights is "):
        check_same_config(CONFIG, frozen_weights=fingerprint({"a": np.arange(1, 4)}))


def test_paths_and_workers_may_differ():
    config = TrainingConfig(
        run=RunConfig("/mnt/a", 100),
        data=DataConfig("folder", "/scratch/images", workers=8),
        hosts=HostsConfig("localhost:1", 2, 1),
    )
    check_same_config(config, frozen_weights=fingerprint({"a": np.arange(3)}))


PROCESS = """
import sys
from bitdance_jax.config import HostsConfig
from bitdance_jax.distributed import multihost
from bitdance_jax.distributed.consistency import check_same
from bitdance_jax.cli.command_line import run
def main():
    process_id = int(sys.argv[2])
    multihost.initialize(HostsConfig(sys.argv[1], 2, process_id))
    with multihost.stop_all_on_error():
        check_same({"seed": 1, "prompts": ["a", "ü"]})
        check_same({"seed": process_id, **({"only": 1.5} if process_id else {})})
sys.exit(run(main))
"""


@pytest.mark.slow
def test_two_processes_behind_a_proxy_end_with_the_difference():
    """Without `_bypass_proxy` JAX would look for the coordinator behind the proxy, for ever."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    variables = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "http_proxy": "http://127.0.0.1:9",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(process_id)],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process_id in range(2)
    ]
    outputs = [process.communicate(timeout=90)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    for output in outputs:
        assert output.count("(only is None and 1.5; seed is 0 and 1)") == 1
        assert "error: " in output
        assert "Traceback" not in output
