"""Operations of convolutions, as in TPU programs. test_cost.py compares complete programs."""

import pytest

from bitdance_jax.plan import hlo
from bitdance_jax.plan.hlo_flops import flops, passes


def convolution(lhs, rhs, out, attributes):
    text = f"""ENTRY %main (a: f32[1]) -> f32[1] {{
  %a = f32[{lhs}]{{0}} parameter(0)
  %b = f32[{rhs}]{{0}} parameter(1)
  ROOT %conv = f32[{out}]{{0}} convolution(%a, %b), {attributes}
}}
"""
    module = hlo.parse(text)
    return module, module["main"], module["main"]["conv"]


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "attributes", "count"),
    [
        (
            "16,256,1024",
            "1024,4096,1",
            "16,256,4096",
            "window={size=1}, dim_labels=0bf_io0->0bf",
            16 * 256 * 1024 * 4096,
        ),
        # A batch of 5 products as one convolution, in which all but 5 of 5 x 5 pairs are padding.
        (
            "5,7,3",
            "5,3,11",
            "5,7,11",
            "window={size=5 stride=4 pad=4_4 lhs_dilate=5 rhs_reversal=1}, dim_labels=0bf_0io->0bf",
            5 * 7 * 3 * 11,
        ),
        ("2,10,3", "4,3,8", "2,7,8", "window={size=4}, dim_labels=b0f_0io->b0f", 2 * 7 * 4 * 3 * 8),
        (
            "2,10,3",
            "3,3,8",
            "2,10,8",
            "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
            2 * (3 * 10 - 2) * 3 * 8,
        ),
        (
            "2,10,6",
            "3,3,8",
            "2,5,8",
            "window={size=3 stride=2 pad=0_1}, dim_labels=b0f_0io->b0f, feature_group_count=2",
            2 * 14 * 3 * 8,
        ),
        (
            "2,5,3",
            "3,3,8",
            "2,9,8",
            "window={size=3 pad=1_1 lhs_dilate=2}, dim_labels=b0f_0io->b0f",
            2 * 13 * 3 * 8,
        ),
        (
            "6,10,3",
            "4,3,8",
            "3,7,8",
            "window={size=4}, dim_labels=b0f_0io->b0f, batch_group_count=2",
            3 * 7 * 4 * 3 * 8,
        ),
    ],
)
def test_multiply_adds_without_padding(lhs, rhs, out, attributes, count):
    assert flops(*convolution(lhs, rhs, out, attributes)) == 2 * count


def test_passes_of_the_matrix_unit():
    attributes = "window={size=1}, dim_labels=0bf_io0->0bf"
    assert passes(*convolution("1,2,3", "3,4,1", "1,2,4", attributes)) == 1
    attributes += ", operand_precision={highest,highest}"
    assert passes(*convolution("1,2,3", "3,4,1", "1,2,4", attributes)) == 6


@pytest.mark.parametrize(
    ("attributes", "count"),
    [
        (
            'custom_call_target="__cublas$gemm", backend_config={"dot_dimension_numbers":'
            '{"lhs_contracting_dimensions":["1"]}}',
            2 * 6 * 8 * 4,
        ),
        (
            'custom_call_target="tpu_custom_call", backend_config={"cost_estimate":'
            '{"bytes":"1","flops":"123"}}',
            123,
        ),
        ('custom_call_target="Sharding"', 0),
        # Two products of 6 heads of 8 queries and keys, half of which are seen.
        (
            'custom_call_target="tpu_custom_call", '
            'metadata={op_name="splash_mha_fwd_segmented_residuals/pallas_call"}',
            6 * 8 * 8 * 128 * 2,
        ),
    ],
)
def test_calls_of_libraries_and_kernels(attributes, count):
    text = f"""ENTRY %main (a: f32[1]) -> f32[1] {{
  %a = f32[6,4]{{1,0}} parameter(0)
  %b = f32[4,8]{{1,0}} parameter(1)
  %blocks = s32[1,1,1]{{2,1,0}} parameter(2)
  %q = bf16[6,8,128]{{2,1,0}} parameter(3)
  ROOT %call = (f32[6,8]{{1,0}}, s8[64]{{0}}) custom-call(%a, %b, %blocks, %q), {attributes}
}}
"""
    module = hlo.parse(text)
    assert flops(module, module["main"], module["main"]["call"]) == count
