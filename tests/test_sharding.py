"""Batches over devices. Four devices need a process of their own; two hosts are in tests/sampling/test_npz.py."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from bitdance_jax import UserError, sharding


def test_one_device_changes_nothing():
    mesh = sharding.data_mesh()
    batch = {"image": np.arange(12, dtype=np.uint8).reshape(3, 4), "label": np.arange(3)}
    for whole in (False, True):
        sharded = sharding.shard_batch(mesh, batch, whole=whole)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(sharding.gather, sharded), batch)
    np.testing.assert_array_equal(sharding.replicate(mesh, batch)["image"], batch["image"])


def test_four_devices():
    variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    environment = os.environ | variables | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, __file__], env=environment, check=True)


def on_four_devices():
    mesh = sharding.data_mesh()
    assert (dict(mesh.shape), mesh.axis_types) == ({"data": 4}, (jax.sharding.AxisType.Auto,))
    rows = np.arange(16).reshape(8, 2)
    for whole in (False, True):
        sharded = sharding.shard_batch(mesh, [rows], whole=whole)[0]
        assert [shard.data.tolist() for shard in sharded.addressable_shards] == [rows[i : i + 2].tolist() for i in range(0, 8, 2)]
        np.testing.assert_array_equal(sharding.gather(sharded), rows)
    copies = sharding.replicate(mesh, {"w": rows})["w"].addressable_shards
    assert len(copies) == 4 and all((copy.data == rows).all() for copy in copies)
    with pytest.raises(UserError, match=r"^a batch of 6 cannot be split over 4 devices; make it a multiple of 4$"):
        sharding.shard_batch(mesh, rows[:6])


def test_what_the_first_host_does():
    assert sharding.on_first_host(lambda: 7) == 7

    def fail():
        raise UserError("no room")

    with pytest.raises(UserError, match=r"^no room$"):
        sharding.on_first_host(fail)


def test_no_other_hosts_to_join(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"^cannot join the other hosts .* is JAX_COORDINATOR_ADDRESS, .* set on each") as caught:
        sharding.start_multi_host()
    assert "\n" not in str(caught.value)


if __name__ == "__main__":
    on_four_devices()
