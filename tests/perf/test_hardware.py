import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bitdance_jax.errors import ResourceError
from bitdance_jax.perf import hardware
from bitdance_jax.perf.hardware import CHIPS, check_fits, chip_of


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100_40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
    ],
)
def test_the_longest_prefix_decides(kind, name):
    assert chip_of(SimpleNamespace(device_kind=kind)).name == name


def test_unknown_devices():
    assert chip_of(jax.devices("cpu")[0]) is None


def test_names_and_kinds_are_unique():
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    kinds = [kind for chip in CHIPS for kind in chip.kinds]
    assert len(set(kinds)) == len(kinds)


def test_a_tpus_clock_and_its_matrix_units_give_its_peak():
    """A matrix unit does 128 x 128 multiply-adds a cycle, and a chip has 1, 2, 4, ... of them."""
    for chip in CHIPS:
        assert (chip.clock is not None) == (chip.torus > 0)
        if chip.clock is not None:
            units = chip.flops / (chip.clock * 2**15)
            assert units == pytest.approx(2 ** round(math.log2(units)), rel=0.03)


def test_arrays_that_do_not_fit_a_device(monkeypatch):
    """Also where the number of bytes exceeds 64 bits; of a sharded array a shard counts."""
    check_fits({"a": jax.ShapeDtypeStruct((2**20,), np.float32)}, "it")
    with pytest.raises(ResourceError, match=r"it takes 7\.2e\+16 GiB on each device, and cpu has "):
        check_fits([jax.ShapeDtypeStruct((2**42, 2**42), np.float32)], "it")

    monkeypatch.setattr(hardware, "device_memory", lambda _: 1000.0)
    check_fits(jax.ShapeDtypeStruct((250,), np.float32), "it")
    with pytest.raises(ResourceError, match="it takes"):
        check_fits(jax.ShapeDtypeStruct((251,), np.float32), "it")
    sharding = NamedSharding(jax.make_mesh((jax.device_count(),), ("fsdp",)), PartitionSpec("fsdp"))
    abstract = jax.ShapeDtypeStruct((512, 512), np.float32, sharding=sharding)
    part = 512 * 512 * 4 / jax.device_count()
    monkeypatch.setattr(hardware, "device_memory", lambda _: part)
    check_fits(abstract, "it")
    monkeypatch.setattr(hardware, "device_memory", lambda _: part - 1)
    with pytest.raises(ResourceError, match="it takes"):
        check_fits(abstract, "it")
