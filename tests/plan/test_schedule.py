"""What runs beside what, by hand: a loop of three turns that copies 256 KB to vector memory (0.262 s) beside a product there."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from bitdance_jax.perf.hardware import Chip
from bitdance_jax.plan import cost, hlo
from bitdance_jax.plan.schedule import scheduled_seconds


CHIP = Chip("toy", (), flops=1e9, memory=1e9, bandwidth=1e6, link=1e6)
COPY, PRODUCT = 256 * 256 * 4 / 1e6, 2 * 256**3 / 1e9
NEAR = "f32[256,256]{1,0:S(1)}"

TEXT = f"""%body (p: (s32[], f32[256,256], f32[256,256], f32[256,256])) -> (s32[], f32[256,256], f32[256,256], f32[256,256]) {{
  %p = (s32[], f32[256,256]{{1,0}}, {NEAR}, {NEAR}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %w = f32[256,256]{{1,0}} get-tuple-element(%p), index=1
  %x = {NEAR} get-tuple-element(%p), index=2
  BODY
  ROOT %t = (s32[], f32[256,256]{{1,0}}, {NEAR}, {NEAR}) tuple(%i, %w, %z, %x)
}}

%condition (q: (s32[], f32[256,256], f32[256,256], f32[256,256])) -> pred[] {{
  %q = (s32[], f32[256,256]{{1,0}}, {NEAR}, {NEAR}) parameter(0)
  ROOT %c = pred[] constant(true)
}}

ENTRY %main (a: f32[256,256], b: f32[256,256]) -> f32[256,256] {{
  %a = f32[256,256]{{1,0}} parameter(0)
  %b = {NEAR} parameter(1)
  %zero = s32[] constant(0)
  %init = (s32[], f32[256,256]{{1,0}}, {NEAR}, {NEAR}) tuple(%zero, %a, %b, %b)
  %out = (s32[], f32[256,256]{{1,0}}, {NEAR}, {NEAR}) while(%init), condition=%condition, body=%body, backend_config={{TRIPS}}
  ROOT %r = {NEAR} get-tuple-element(%out), index=2
}}
""".replace("TRIPS", '"known_trip_count":{"n":"3"}')

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
def test_a_copy_hides_behind_what_stands_between_its_halves(faster):
    """Of a product that takes longer than the copy, or 100 times less, and one after it that reads the copy."""
    turn = max(PRODUCT * 20 / faster, COPY) + PRODUCT * 20 / faster
    assert seconds(
        [START, product("y", "x", "x"), DONE, product("z", "y", "done")], faster * 5e7
    ) == pytest.approx(3 * turn)


def test_a_copy_without_anything_between_is_waited_for():
    assert seconds([START, DONE, product("z", "x", "done")]) == pytest.approx(3 * (COPY + PRODUCT))


def test_a_copy_for_the_next_turn():
    """The first turn has nothing to wait for, the others wait for what is left after a product; the last copy is waited for at the end."""
    early = f"%before = {NEAR} get-tuple-element(%p), index=3"
    done = f"%done = {NEAR} copy-done(%before)"
    assert seconds([early, done, START, product("z", "x", "done")]) == pytest.approx(
        3 * PRODUCT + 3 * (COPY - PRODUCT)
    )


def test_an_exchange_hides_too_and_one_in_a_piece_does_not():
    both = NEAR.replace("256", "512", 1)
    halves = [
        f"%start = ({NEAR}, {both}) all-gather-start(%x), channel_id=1, replica_groups={{{{0,1}}}}, dimensions={{0}}"
    ]
    halves += [
        product("y", "x", "x"),
        f"%done = {both} all-gather-done(%start)",
        product("z", "y", "x"),
    ]
    whole = [
        f"%done = {NEAR} all-reduce(%x), channel_id=1, replica_groups={{{{0,1}}}}, to_apply=%add"
    ]
    whole += [product("y", "x", "x"), product("z", "y", "done")]
    sent = 256 * 256 * 4 / 1e6
    assert seconds(halves) == pytest.approx(3 * (max(sent, PRODUCT) + PRODUCT), rel=1e-4)
    assert seconds(whole) == pytest.approx(3 * (sent + 2 * PRODUCT), rel=1e-4)
