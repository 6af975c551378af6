import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from bitdance_jax.perf.hardware import Chip
from bitdance_jax.plan import cost, findings, hlo, report
from bitdance_jax.plan.estimate import estimate


CHIP = Chip("toy", (), flops=1e6, memory=1e9, bandwidth=1e6, link=1e2, clock=1e3)

TEXT = """%body (p: SHAPES) -> SHAPES {
  %p = STATE parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %w = f32[1024,256]{1,0} get-tuple-element(%p), index=1
  %x = f32[256,1024]{1,0} get-tuple-element(%p), index=2
  %turned = f32[256,1024]{1,0} transpose(%w), dimensions={1,0}, OP(0)
  %y = f32[256,256]{1,0} dot(%x, %turned), lhs_contracting_dims={1}, OP(1)
  %summed = f32[256,256]{1,0} all-reduce(%y), channel_id=1, replica_groups={{0}}, to_apply=%add
  ROOT %t = STATE tuple(%i, %w, %x)
}

%condition (q: SHAPES) -> pred[] {
  %q = STATE parameter(0)
  ROOT %c = pred[] constant(true)
}

%keep (r: f32[1024,256], k: s32[]) -> f32[256,256] {
  %r = f32[1024,256]{1,0} parameter(0)
  %k = s32[] parameter(1)
  ROOT %s = f32[256,256]{1,0} dynamic-slice(%r, %k, %k), dynamic_slice_sizes={256,256}
}

ENTRY %main (a: f32[1024,256], b: f32[256,1024]) -> f32[256,256] {
  %a = f32[1024,256]{1,0} parameter(0)
  %b = f32[256,1024]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %init = STATE tuple(%zero, %a, %b)
  %out = STATE while(%init), condition=%condition, body=%body, TRIPS
  %narrow = f32[4096,8]{1,0:T(8,128)} constant(0)
  %wide = f32[4096,8]{1,0:T(8,128)} negate(%narrow), OP(2)
  %all = f32[1024,256]{1,0} all-reduce(%a), channel_id=2, replica_groups={{0,1}}, OP(3)
  ROOT %mine = f32[256,256]{1,0} fusion(%all, %zero), kind=kLoop, calls=%keep
}
"""
OP_NAMES = (
    "jit(step)/while/body/closed_call/layers_3/w1/transpose",
    "while/body/layers_4/w1/dot_general",
    "jit(step)/transpose(jvp(Model))/Model.read/head.denoise/neg",
    "rematted_computation/mlp/add",
)
TEXT = TEXT.replace("TRIPS", 'backend_config={"known_trip_count":{"n":"3"}}')
TEXT = TEXT.replace("STATE", "(s32[], f32[1024,256]{1,0}, f32[256,1024]{1,0})")
TEXT = TEXT.replace("SHAPES", "(s32[], f32[1024,256], f32[256,1024])")
for number, op_name in enumerate(OP_NAMES):
    TEXT = TEXT.replace(f"OP({number})", f'metadata={{op_name="{op_name}"}}')


@pytest.fixture(scope="module")
def module():
    return hlo.parse(TEXT)


@pytest.fixture(scope="module")
def rows(module):
    return cost.costs(module, 2)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(
        np.array(jax.devices("cpu")[:1] * 2, object).reshape(2),
        ("fsdp",),
        axis_types=(AxisType.Auto,),
    )


def test_sources_name_modules_and_directions(rows):
    sources = {row.instruction.name: findings.source(row) for row in rows}
    assert sources["turned"] == "layers_*/w1/transpose"
    assert sources["wide"] == "backward head/neg"
    assert sources["all"] == "recomputed mlp/add"
    assert sources["summed"] == "layers_*/w1/dot_general"  # of its operand


def test_the_slowest_kernels_and_modules_come_first(rows):
    first = findings.slowest_kernels(rows, CHIP, 1)[0]
    flops = 2 * 256 * 256 * 1024
    assert (first.source, first.times, first.seconds) == (
        "layers_*/w1/dot_general",
        3,
        pytest.approx(3 * flops / CHIP.flops),
    )
    part = findings.slowest_modules(rows, CHIP, 1)[0]
    assert part.source == "layers_*/w1"
    assert part.seconds > first.seconds


def test_copies_in_loops(module, rows):
    (copy,) = findings.copies_in_loops(module, rows, CHIP, 5)
    assert (copy.what, copy.times, copy.bytes) == ("transpose", 3, 3 * 2**20)


def test_an_all_reduce_that_is_then_sliced(module, rows, mesh):
    (missed,) = findings.missed_reduce_scatters(module, rows, mesh, CHIP, 5)
    assert (missed.what, missed.bytes) == ("all-reduce over fsdp", 2**20)
    assert findings.slowest_collectives(rows, mesh, CHIP, 5) == [missed]


def test_padding_and_largest_arrays(rows):
    (padded,) = findings.padded_arrays(rows, CHIP, 5)
    assert (padded.what, padded.bytes) == ("negate", 4096 * (128 - 8) * 4)
    assert findings.largest_arrays(rows, 1)[0].bytes == 4096 * 128 * 4


def test_an_estimate_sums_kernels_and_collectives(rows, mesh):
    total = estimate(rows, mesh, CHIP, 0.0)
    assert total.flops == 3 * 2 * 256 * 256 * 1024
    assert total.arithmetic == pytest.approx(total.flops / CHIP.flops)
    assert total.memory == pytest.approx(total.bytes / CHIP.bandwidth)
    assert total.sent == 2**20
    assert total.communication == pytest.approx(2**20 / CHIP.link, rel=1e-3)
    assert total.bounds["overlapped"] == max(total.arithmetic, total.memory, total.communication)
    assert total.bounds["serial"] == total.kernel_seconds + total.communication <= total.expected
    assert (
        total.arithmetic + total.memory > total.kernel_seconds > max(total.arithmetic, total.memory)
    )


def test_the_table_has_times_only_if_a_finding_has():
    arrays = findings.Finding("copy", "f32[4]", 1, 16, 0.0, "layer")
    kernels = findings.Finding("copy", "f32[4]", 1, 16, 2e-3, "layer")
    assert "ms" not in report._finding_table([arrays])[0].split()
    assert report._finding_table([arrays, kernels])[-1].split()[-2] == "2.00"
