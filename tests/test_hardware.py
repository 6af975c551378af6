import math
from types import SimpleNamespace

import jax
import pytest

from bitdance_jax.hardware import CHIPS, chip_of


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
def test_the_longest_kind_that_fits_is_meant(kind, name):
    assert chip_of(SimpleNamespace(device_kind=kind)).name == name


def test_unknown_devices_have_no_figures():
    assert chip_of(jax.devices("cpu")[0]) is None


def test_names_and_kinds_are_unique():
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    kinds = [kind for chip in CHIPS for kind in chip.kinds]
    assert len(set(kinds)) == len(kinds)


def test_a_tpus_clock_and_its_matrix_units_give_its_peak():
    """A matrix unit of 128 x 128 makes 2^15 operations a cycle, and a chip has 1, 2, 4, ... of them."""
    for chip in CHIPS:
        assert (chip.clock is not None) == (chip.torus > 0)
        if chip.clock is not None:
            units = chip.flops / (chip.clock * 2**15)
            assert units == pytest.approx(2 ** round(math.log2(units)), rel=0.03)
