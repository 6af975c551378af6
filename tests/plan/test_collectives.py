from dataclasses import dataclass

import numpy as np
import pytest
from jax.sharding import Mesh

from bitdance_jax.perf.hardware import CHIPS, Chip
from bitdance_jax.plan import collectives, hlo
from bitdance_jax.plan.collectives import HOP_SECONDS, Collective


V5E = next(chip for chip in CHIPS if chip.name == "v5e")
SWITCH = Chip("switch", (), 1.0, 1.0, 1.0, link=100.0)


def find(kind, operand, attributes, devices=16):
    text = f"""ENTRY %main (a: f32[1]) -> f32[1] {{
  %a = {operand} parameter(0)
  ROOT %x = f32[1]{{0}} {kind}(%a), {attributes}
}}
"""
    module = hlo.parse(text)
    (found,) = collectives.find(module, module["main"], module["main"]["x"], devices)
    return found


@dataclass(frozen=True)
class Device:
    coords: tuple[int, ...]


def mesh(shape, names, topology):
    """A mesh of devices with coordinates on a torus, in order."""
    coords = np.indices(topology[::-1]).reshape(len(topology), -1).T[:, ::-1]
    devices = np.empty(len(coords), object)
    devices[:] = [Device((*coord, 0, 0)[:3]) for coord in coords.tolist()]
    return Mesh(devices.reshape(shape), names)


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", (0, 1, 2, 3)),
        ("[4,4]<=[16]", (0, 1, 2, 3)),
        ("[4,4]<=[4,4]T(1,0)", (0, 4, 8, 12)),
        ("mesh['a'=2,'b'=8] {'b'}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("mesh['a'=2,'b'=8] {'a'}", (0, 8)),
        ("mesh['a'=4,'b'=4] {'a':(1)2}", (0, 8)),
        ("mesh['a'=4,'b'=4] {'b':(2)2}", (0, 1)),
        ("mesh['a'=2,'b'=4,'c'=2], device_ids=([2,8]T(1,0)) {'c'}", (0, 8)),
        ("mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'a'}", (3, 1)),
        ("{}", tuple(range(16))),
    ],
)
def test_the_first_group_in_every_format(groups, members):
    found = find(
        "all-reduce",
        "f32[10]{0}",
        f"channel_id=1, replica_groups={groups}, use_global_device_ids=true",
    )
    assert found.devices == members


@pytest.mark.parametrize(
    ("kind", "size", "sent"),
    [
        ("all-gather", 4000, 3000),
        ("all-gather-start", 4000, 3000),
        ("all-reduce", 1000, 1500),
        ("reduce-scatter", 1000, 750),
        ("all-to-all", 1000, 750),
    ],
)
def test_bytes_of_each_kind(kind, size, sent):
    found = find(kind, "f32[250]{0}", "channel_id=3, replica_groups={{0,1,2,3}}")
    assert found.kind == kind.removesuffix("-start")
    assert (found.bytes, found.sent, found.channel) == (size, sent, "3")


def test_a_permutation_runs_along_its_cycle():
    found = find(
        "collective-permute",
        "f32[250]{0}",
        "channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
    )
    assert (found.devices, found.sent) == ((0, 1, 2, 3), 1000)


def test_an_all_reduce_with_a_slice_is_a_reduce_scatter():
    text = """%all-reduce-scatter.1 (i: f32[16]) -> f32[4] {
  %i = f32[16]{0} parameter(0)
  %r = f32[16]{0} all-reduce(%i), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  %z = s32[] constant(0)
  ROOT %s = f32[4]{0} dynamic-slice(%r, %z), dynamic_slice_sizes={4}
}

ENTRY %main (a: f32[16]) -> f32[4] {
  %a = f32[16]{0} parameter(0)
  ROOT %f = f32[4]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    module = hlo.parse(text)
    assert collectives.find(module, module["main"], module["main"]["f"], 4) == [
        Collective("reduce-scatter", 64, (0, 1, 2, 3), "9")
    ]


def test_axes_of_a_group():
    devices = mesh((2, 4, 2), ("data", "fsdp", "tensor"), (4, 4))
    assert Collective("all-reduce", 1, (0, 8), "").axes(devices) == ("data",)
    assert Collective("all-reduce", 1, (0, 2, 4, 6), "").axes(devices) == ("fsdp",)
    assert Collective("all-reduce", 1, tuple(range(8)), "").axes(devices) == ("fsdp", "tensor")


def test_a_line_is_half_as_fast_as_a_ring():
    line = mesh((4, 4), ("a", "b"), (4, 4))
    ring = mesh((16, 16), ("a", "b"), (16, 16))
    size = 10**9
    four = Collective("all-gather", size, (0, 1, 2, 3), "").seconds(line, V5E)
    assert four == pytest.approx(size * 3 / 4 / V5E.link + 3 * HOP_SECONDS)
    sixteen = Collective("all-gather", size, tuple(range(16)), "").seconds(ring, V5E)
    assert sixteen == pytest.approx(size * 15 / 16 / (2 * V5E.link) + 8 * HOP_SECONDS)


def test_a_group_over_two_axes_has_the_links_of_both():
    devices = mesh((4, 4), ("a", "b"), (4, 4))
    size = 10**9
    both = Collective("reduce-scatter", size, tuple(range(16)), "").seconds(devices, V5E)
    assert both == pytest.approx(size * 15 / 16 / (2 * V5E.link) + 6 * HOP_SECONDS)


def test_groups_that_interleave_share_the_links():
    devices = mesh((2, 2, 4), ("a", "b", "c"), (4, 4))
    size = 10**9
    found = Collective("all-gather", size, (0, 8), "")  # rows 0 and 2 of a column, as are 1 and 3
    assert found.seconds(devices, V5E) == pytest.approx(
        size / 2 / (V5E.link * 2 / 3) + 2 * HOP_SECONDS
    )


def test_a_switch_and_a_group_of_one():
    devices = mesh((4,), ("a",), (4,))
    assert Collective("all-reduce", 400, (0, 1, 2, 3), "").seconds(
        devices, SWITCH
    ) == pytest.approx(600 / 100 + HOP_SECONDS)
    assert Collective("all-reduce", 400, (0,), "").seconds(devices, SWITCH) == 0
