import json
from pathlib import Path

import processes
import pytest

from bitdance_jax.plan import cost, hlo


@pytest.fixture(scope="module")
def measured():
    script = Path(__file__).with_name("programs_on_cpus.py")
    return json.loads(processes.python([script], script.parent, devices=8))


@pytest.mark.parametrize(
    "name", ["product", "nested_scans", "gradient", "stacked_layers", "convolution"]
)
def test_operations_on_all_devices_are_those_of_the_jaxpr(measured, name):
    assert measured[name]["counted"] == measured[name]["traced"] > 0


def test_collectives_with_their_executions_bytes_and_axes(measured):
    expected = {
        "product": [],
        "nested_scans": [],
        "convolution": [],
        "stacked_layers": [["all-gather", 6, 16 * 16 * 4, ["fsdp"]]],
        "summed": [["all-reduce", 1, 100 * 4, ["data", "fsdp"]]],
        "resharded": [["all-to-all", 1, 64 // 4 * 128 * 4, ["fsdp"]]],
        # In every iteration: XLA does not see that one sum after the loop would do.
        "gradient": [["all-reduce", 15, 16 * 16 * 4, ["data", "fsdp"]]],
    }
    assert {name: program["collectives"] for name, program in measured.items()} == expected


def test_memory_read_and_written(measured):
    assert measured["product"]["bytes"] == (8 * 32 + 32 * 16 + 8 * 16) * 4
    # x * 2 before the collective, + 1 after it.
    assert measured["resharded"]["bytes"] == 2 * (2 * 16 * 128 * 4)


def costs(text, devices=4):
    return {row.instruction.name: row for row in cost.costs(hlo.parse(text), devices)}


def loop(condition, body_step, start="0"):
    return f"""%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %p = (s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4]{{0}} get-tuple-element(%p), index=1
  %one = s32[] constant({body_step})
  %next = s32[] add(%i, %one)
  %double = f32[4]{{0}} add(%x, %x)
  ROOT %t = (s32[], f32[4]{{0}}) tuple(%next, %double)
}}

%condition (q: (s32[], f32[4])) -> pred[] {{
  %q = (s32[], f32[4]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %end = s32[] constant(12)
  ROOT %c = pred[] {condition}
}}

ENTRY %main (x: f32[4]) -> (s32[], f32[4]) {{
  %x0 = f32[4]{{0}} parameter(0)
  %zero = s32[] constant({start})
  %copied = s32[] copy(%zero)
  %init = (s32[], f32[4]{{0}}) tuple(%copied, %x0)
  ROOT %w = (s32[], f32[4]{{0}}) while(%init), condition=%condition, body=%body
}}
"""


@pytest.mark.parametrize(("step", "start", "trips"), [(1, 0, 12), (2, 0, 6), (1, 2, 10), (5, 0, 3)])
def test_iterations_of_a_loop_from_its_condition(step, start, trips):
    row = costs(loop("compare(%j, %end), direction=LT", step, start))["double"]
    assert (row.trips, row.looped, row.bytes) == (trips, True, 3 * 16)


def test_a_loop_without_a_bound_is_an_error():
    with pytest.raises(ValueError, match=r"loop w .*trips"):
        costs(loop("compare(%j, %j), direction=EQ", 1))


def test_slices_of_large_arrays_count_as_slices():
    rows = costs("""%read (a: f32[100,64], i: s32[]) -> f32[1,64] {
  %a = f32[100,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %s = f32[1,64]{1,0} dynamic-slice(%a, %i, %z), dynamic_slice_sizes={1,64}
}

%write (b: f32[100,64], j: s32[], u: f32[64]) -> f32[100,64] {
  %b = f32[100,64]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %u = f32[64]{0} parameter(2)
  %r = f32[1,64]{1,0} bitcast(%u)
  %y = s32[] constant(0)
  ROOT %d = f32[100,64]{1,0} dynamic-update-slice(%b, %r, %j, %y)
}

%both (c: f32[100,64], k: s32[]) -> f32[1,64] {
  %c = f32[100,64]{1,0} parameter(0)
  %k = s32[] parameter(1)
  ROOT %n = f32[1,64]{1,0} fusion(%c, %k), kind=kLoop, calls=%read
}

ENTRY %main (m: f32[100,64], n: s32[], v: f32[64]) -> f32[100,64] {
  %m = f32[100,64]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %v = f32[64]{0} parameter(2)
  %reads = f32[1,64]{1,0} fusion(%m, %n), kind=kLoop, calls=%read
  %nested = f32[1,64]{1,0} fusion(%m, %n), kind=kLoop, calls=%both
  %writes = f32[100,64]{1,0} fusion(%m, %n, %v), kind=kLoop, calls=%write
  %plain = f32[1,64]{1,0} dynamic-slice(%m, %n, %n), dynamic_slice_sizes={1,64}
  ROOT %all = f32[100,64]{1,0} negate(%m)
}
""")
    row, number = 64 * 4, 4
    assert rows["reads"].bytes == rows["nested"].bytes == 2 * row + number
    assert rows["writes"].bytes == 2 * row + number
    assert rows["plain"].bytes == 2 * row
    assert rows["all"].bytes == 2 * 100 * row


def test_a_product_reads_an_array_through_a_fused_bitcast():
    """As in TPU programs, for a kernel with several axes."""
    rows = costs("""%rename (a: f32[64,32]) -> f32[64,32,1] {
  %a = f32[64,32]{1,0} parameter(0)
  ROOT %b = f32[64,32,1]{1,0,2} bitcast(%a)
}

%product (c: f32[8,64], d: f32[64,32]) -> f32[8,32] {
  %c = f32[8,64]{1,0} parameter(0)
  %d = f32[64,32]{1,0} parameter(1)
  %e = f32[64,32,1]{1,0,2} fusion(%d), kind=kLoop, calls=%rename
  ROOT %f = f32[8,32]{1,0} convolution(%c, %e), dim_labels=bf_io0->bf
}

ENTRY %main (x: f32[8,64], y: f32[64,32]) -> f32[8,32] {
  %x = f32[8,64]{1,0} parameter(0)
  %y = f32[64,32]{1,0} parameter(1)
  ROOT %z = f32[8,32]{1,0} fusion(%x, %y), kind=kOutput, calls=%product
}
""")
    assert rows["z"].bytes == 4 * (8 * 64 + 64 * 32 + 8 * 32)


def test_vector_memory_does_not_count():
    rows = costs("""ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %fetch = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %fetched = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%fetch)
  %inside = f32[8,128]{1,0:T(8,128)S(1)} negate(%fetched)
  ROOT %out = f32[8,128]{1,0:T(8,128)} negate(%inside)
}
""")
    assert (rows["fetch"].bytes, rows["inside"].bytes, rows["out"].bytes) == (4096, 0, 4096)
    assert rows["fetched"].bytes == 0
    assert "a" not in rows


def test_a_collective_in_several_fusions_counts_once():
    """As in TPU programs: each fusion contains the collective, and passes its buffers on."""
    gather = "all-gather(%{}), channel_id=6, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}"
    three = "(f32[100]{0}, f32[8]{0}, f32[32]{0})"
    rows = costs(f"""%start (a: f32[8]) -> (f32[8], f32[32]) {{
  %a = f32[8]{{0}} parameter(0)
  %g = f32[32]{{0}} {gather.format("a")}
  ROOT %s = (f32[8]{{0}}, f32[32]{{0}}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%middle (b: f32[8], c: f32[32], d: f32[100]) -> (f32[100], f32[8], f32[32]) {{
  %b = f32[8]{{0}} parameter(0)
  %c = f32[32]{{0}} parameter(1)
  %d = f32[100]{{0}} parameter(2)
  %h = f32[32]{{0}} {gather.format("b")}
  %e = f32[100]{{0}} negate(%d)
  ROOT %t = (f32[100]{{0}}, f32[8]{{0}}, f32[32]{{0}}) tuple(%e, %b, %h)
}}

ENTRY %main (x: f32[8], y: f32[100]) -> f32[100] {{
  %x = f32[8]{{0}} parameter(0)
  %y = f32[100]{{0}} parameter(1)
  %one = (f32[8]{{0}}, f32[32]{{0}}) fusion(%x), kind=kCustom, calls=%start
  %p = f32[8]{{0}} get-tuple-element(%one), index=0
  %q = f32[32]{{0}} get-tuple-element(%one), index=1
  ROOT %two = {three} fusion(%p, %q, %y), kind=kCustom, calls=%middle
}}
""")
    assert [len(rows[name].collectives) for name in ("one", "two")] == [1, 0]
    assert rows["one"].collectives[0].bytes == 32 * 4
    assert (rows["one"].bytes, rows["two"].bytes) == (0, 2 * 400)


def test_the_branch_with_most_operations_counts():
    rows = costs("""%few (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  ROOT %n = f32[8,8]{1,0} negate(%a)
}

%many (b: f32[8,8]) -> f32[8,8] {
  %b = f32[8,8]{1,0} parameter(0)
  ROOT %d = f32[8,8]{1,0} dot(%b, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (p: pred[], x: f32[8,8]) -> f32[8,8] {
  %p = pred[] parameter(0)
  %x = f32[8,8]{1,0} parameter(1)
  ROOT %c = f32[8,8]{1,0} conditional(%p, %x, %x), true_computation=%few, false_computation=%many
}
""")
    assert set(rows) == {"d"}
    assert rows["d"].flops == 2 * 8**3
