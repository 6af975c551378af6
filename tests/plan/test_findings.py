import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from bitdance_jax.perf.hardware import Chip
from bitdance_jax.plan import cost, findings, hlo, report
from bitdance_jax.plan.estimate import estimate


CHIP = Chip("toy", (), flops=1e6, memory=1e9, bandwidth=1e6, link=1e2, clock=1e3)

TEXT = """%body (p: (s32[], f32[1024,256], f32[256,1024])) -> (s32[], f32[1024,256], f32[256,1024]) {
  %p = (s32[], f32[1024,256]{1,0}, f32[256,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %w = f32[1024,256]{1,0} get-tuple-element(%p), index=1
  %x = f32[256,1024]{1,0} get-tuple-element(%p), index=2
  %turned = f32[256,1024]{1,0} transpose(%w), dimensions={1,0}, metadata={op_name="jit(step)/while/body/closed_call/layers_3/w1/transpose"}
  %y = f32[256,256]{1,0} dot(%x, %turned), lhs_contracting_dims={1}, metadata={op_name="while/body/layers_4/w1/dot_general"}
  %summed = f32[256,256]{1,0} all-reduce(%y), channel_id=1, replica_groups={{0}}, to_apply=%add
  ROOT %t = (s32[], f32[1024,256]{1,0}, f32[256,1024]{1,0}) tuple(%i, %w, %x)
}

%condition (q: (s32[], f32[1024,256], f32[256,1024])) -> pred[] {
  %q = (s32[], f32[1024,256]{1,0}, f32[256,1024]{1,0}) parameter(0)
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
  %init = (s32[], f32[1024,256]{1,0}, f32[256,1024]{1,0}) tuple(%zero, %a, %b)
  %out = (s32[], f32[1024,256]{1,0}, f32[256,1024]{1,0}) while(%init), condition=%condition, body=%body, backend_config={TRIPS}
  %narrow = f32[4096,8]{1,0:T(8,128)} constant(0)
  %wide = f32[4096,8]{1,0:T(8,128)} negate(%narrow), metadata={op_name="jit(step)/transpose(jvp(Model))/Model.read/head.denoise/neg"}
  %all = f32[1024,256]{1,0} all-reduce(%a), channel_id=2, replica_groups={{0,1}}, metadata={op_name="rematted_computation/mlp/add"}
  ROOT %mine = f32[256,256]{1,0} fusion(%all, %zero), kind=kLoop, calls=%keep
}
""".replace("TRIPS", '"known_trip_count":{"n":"3"}')


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
    assert sources["summed"] == "layers_*/w1/dot_general"  # of what it sums


def test_the_longest_kernels_and_parts_come_first(rows):
    first = findings.kernels(rows, CHIP, 1)[0]
    flops = 2 * 256 * 256 * 1024
    assert (first.source, first.times, first.seconds) == (
        "layers_*/w1/dot_general",
        3,
        pytest.approx(3 * flops / CHIP.flops),
    )
    part = findings.parts(rows, CHIP, 1)[0]
    assert part.source == "layers_*/w1" and part.seconds > first.seconds


def test_moves_in_loops(module, rows):
    (move,) = findings.moves_in_loops(module, rows, CHIP, 5)
    assert (move.what, move.times, move.bytes) == ("transpose", 3, 3 * 2**20)


def test_a_sum_of_which_a_part_is_kept(module, rows, mesh):
    (missed,) = findings.reductions_then_cut(module, rows, mesh, CHIP, 5)
    assert (missed.what, missed.bytes) == ("all-reduce over fsdp", 2**20)
    assert findings.exchanges(rows, mesh, CHIP, 5) == [missed]


def test_padding_and_largest_results(rows):
    (padded,) = findings.padding(rows, CHIP, 5)
    assert (padded.what, padded.bytes) == ("negate", 4096 * (128 - 8) * 4)
    assert findings.largest_results(rows, 1)[0].bytes == 4096 * 128 * 4


def test_an_estimate_adds_kernels_and_exchanges(rows, mesh):
    total = estimate(rows, mesh, CHIP, 0.0)
    assert total.flops == 3 * 2 * 256 * 256 * 1024
    assert total.arithmetic == pytest.approx(total.flops / CHIP.flops)
    assert total.memory == pytest.approx(total.bytes / CHIP.bandwidth)
    assert total.sent == 2**20 and total.communication == pytest.approx(2**20 / CHIP.link, rel=1e-3)
    assert total.bounds["overlapped"] == max(total.arithmetic, total.memory, total.communication)
    assert total.bounds["serial"] == total.kernel_seconds + total.communication <= total.expected
    assert (
        total.arithmetic + total.memory > total.kernel_seconds > max(total.arithmetic, total.memory)
    )


def test_times_are_a_column_where_they_are_known():
    arrays = findings.Finding("copy", "f32[4]", 1, 16, 0.0, "layer")
    kernels = findings.Finding("copy", "f32[4]", 1, 16, 2e-3, "layer")
    assert "ms" not in report._finding_table([arrays])[0].split()
    assert report._finding_table([arrays, kernels])[-1].split()[-2] == "2.00"
