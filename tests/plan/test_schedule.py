"""Overlap, by hand: a loop of three iterations that copies 256 KB (0.262 s) during a product."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from bitdance_jax.perf.hardware import Chip
from bitdance_jax.plan import cost, hlo
from bitdance_jax.plan.schedule import scheduled_seconds


CHIP = Chip("toy", (), flops=1e9, memory=1e9, bandwidth=1e6, link=1e6)
COPY = 256 * 256 * 4 / 1e6
PRODUCT = 2 * 256**3 / 1e9
NEAR = "f32[256,256]{1,0:S(1)}"
"""In vector memory."""

ARRAYS = "f32[256,256], f32[256,256], f32[256,256]"
STATE = f"(s32[], f32[256,256]{{1,0}}, {NEAR}, {NEAR})"

TEXT = f"""%body (p: (s32[], {ARRAYS})) -> (s32[], {ARRAYS}) {{
  %p = {STATE} parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %w = f32[256,256]{{1,0}} get-tuple-element(%p), index=1
  %x = {NEAR} get-tuple-element(%p), index=2
  BODY
  ROOT %t = {STATE} tuple(%i, %w, %z, %x)
}}

%condition (q: (s32[], {ARRAYS})) -> pred[] {{
  %q = {STATE} parameter(0)
  ROOT %c = pred[] constant(true)
}}

ENTRY %main (a: f32[256,256], b: f32[256,256]) -> f32[256,256] {{
  %a = f32[256,256]{{1,0}} parameter(0)
  %b = {NEAR} parameter(1)
  %zero = s32[] constant(0)
  %init = {STATE} tuple(%zero, %a, %b, %b)
  %out = {STATE} while(%init), condition=%condition, body=%body, TRIPS
  ROOT %r = {NEAR} get-tuple-element(%out), index=2
}}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"3"}}')

START = f"%start = (f32[256,256]{{1,0}}, {NEAR}, u32[]) copy-start(%w)"
DONE = f"%done = {NEAR} copy-done(%start)"


def product(name, left, right):
    return f"%{name} = {NEAR} dot(%{left}, %{right}), lhs_contracting_dims={{1}}"


def seconds(lines, flops=1e9):
    mesh = Mesh(
        np.array(jax.devices("cpu")[:1] * 2, object).reshape(2),
        ("tensor",),
        axis_types=(AxisType.Auto,),
    )
    module = hlo.parse(TEXT.replace("BODY", "\n  ".join(lines)))
    return scheduled_seconds(
        module, cost.costs(module, 2), mesh, dataclasses.replace(CHIP, flops=flops)
    )


@pytest.mark.parametrize("faster", [1, 100])
def test_a_copy_overlaps_with_what_is_between_its_halves(faster):
    """A product that takes longer or 100 times less; another one after it reads the copy."""
    iteration = max(PRODUCT * 20 / faster, COPY) + PRODUCT * 20 / faster
    assert seconds(
        [START, product("y", "x", "x"), DONE, product("z", "y", "done")], faster * 5e7
    ) == pytest.approx(3 * iteration)


def test_a_copy_with_nothing_between_its_halves():
    assert seconds([START, DONE, product("z", "x", "done")]) == pytest.approx(3 * (COPY + PRODUCT))


def test_a_copy_for_the_next_iteration():
    """All but the first wait for the rest of the copy; the last copy ends after the loop."""
    early = f"%before = {NEAR} get-tuple-element(%p), index=3"
    done = f"%done = {NEAR} copy-done(%before)"
    assert seconds([early, done, START, product("z", "x", "done")]) == pytest.approx(
        3 * PRODUCT + 3 * (COPY - PRODUCT)
    )


def test_a_collective_overlaps_only_in_two_halves():
    group = "channel_id=1, replica_groups={{0,1}}"
    both = NEAR.replace("256", "512", 1)
    halves = [
        f"%start = ({NEAR}, {both}) all-gather-start(%x), {group}, dimensions={{0}}",
        product("y", "x", "x"),
        f"%done = {both} all-gather-done(%start)",
        product("z", "y", "x"),
    ]
    single = [
        f"%done = {NEAR} all-reduce(%x), {group}, to_apply=%add",
        product("y", "x", "x"),
        product("z", "y", "done"),
    ]
    sent = 256 * 256 * 4 / 1e6
    assert seconds(halves) == pytest.approx(3 * (max(sent, PRODUCT) + PRODUCT), rel=1e-4)
    assert seconds(single) == pytest.approx(3 * (sent + 2 * PRODUCT), rel=1e-4)
