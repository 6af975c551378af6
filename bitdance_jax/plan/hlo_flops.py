"""Floating-point operations of HLO instructions.

Only matrix products and convolutions count: 2 operations for each multiply-add, as in `perf.flops`.
"""

import itertools
import json
import math
import re

from bitdance_jax.plan.hlo import Computation, Instruction, Module, Shape, leaves


def flops(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Operations of one execution; for a fusion, of all instructions in it."""
    if instruction.opcode == "dot":
        return _dot(computation, instruction)
    if instruction.opcode == "convolution":
        return _convolution(computation, instruction, instruction.array)
    if instruction.opcode == "custom-call":
        return _custom_call(computation, instruction)
    if instruction.opcode == "fusion":
        inner = module[instruction.called("calls") or ""]
        return sum(flops(module, inner, part) for part in inner)
    return 0


def passes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """How many bfloat16 products a TPU computes for one product of an instruction.

    6 in precision "highest", 3 in "high", otherwise 1.
    """
    if instruction.opcode == "fusion":
        inner = module[instruction.called("calls") or ""]
        return max((passes(module, inner, part) for part in inner), default=1)
    if instruction.opcode not in ("dot", "convolution"):
        return 1
    precision = instruction.attribute(r"operand_precision=\{(\w+)") or "default"
    return {"highest": 6, "high": 3}.get(precision, 1)


def _operand(computation: Computation, instruction: Instruction, number: int) -> Shape:
    return computation[instruction.operands[number]].array


def _dot(computation: Computation, instruction: Instruction) -> int:
    lhs = _operand(computation, instruction, 0).dims
    contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    terms = math.prod(lhs[int(axis)] for axis in contracted.split(",") if axis)
    return 2 * instruction.array.size * terms


def _convolution(computation: Computation, instruction: Instruction, output: Shape) -> int:
    """Multiply-adds with padding, or with the holes of a dilated input, do not count.

    TPU programs contain matrix products as convolutions, and batches of matrix products as
    convolutions with more padding than input.
    """
    lhs = _operand(computation, instruction, 0)
    rhs = _operand(computation, instruction, 1)
    labels = instruction.attribute(r"dim_labels=([\w>\-]+)") or ""
    lhs_labels, rhs_labels, out_labels = re.split("_|->", labels)
    options = instruction.attribute(r"window=\{([^}]*)\}") or ""
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", options))
    pairs = 1
    for number in range(len(lhs_labels) - 2):
        sides = ((lhs, lhs_labels), (rhs, rhs_labels), (output, out_labels))
        size, kernel, out = (shape.dims[text.index(str(number))] for shape, text in sides)
        pairs *= _count_pairs(size, kernel, out, window=window, axis=number)
    features_in = rhs.dims[rhs_labels.index("i")]
    features_out = output.dims[out_labels.index("f")]
    batch = lhs.dims[lhs_labels.index("b")]
    batch_groups = int(instruction.attribute(r"batch_group_count=(\d+)") or 1)
    return 2 * pairs * features_in * features_out * batch // batch_groups


def _count_pairs(size: int, kernel: int, out: int, *, window: dict[str, str], axis: int) -> int:
    """Pairs of an output and a kernel position along an axis that read an element of the input."""

    def option(name: str, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    stride, base, dilation = (
        int(option(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")
    )
    before = int(option("pad", "0_0").split("_")[0])
    if (stride, base, dilation, before) == (1, 1, 1, 0) and out == size - kernel + 1:
        return out * kernel
    positions = (
        k * dilation + o * stride - before for k, o in itertools.product(range(kernel), range(out))
    )
    return sum(position % base == 0 and 0 <= position // base < size for position in positions)


def _custom_call(computation: Computation, instruction: Instruction) -> int:
    """Operations of a call to a library, or those that a custom kernel declares."""
    target = instruction.attribute(r'custom_call_target="([^"]*)"') or ""
    output = next(leaves(instruction.shape))
    if "gemm" in target or "matmul" in target:
        contracted = instruction.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
        if contracted is None:
            return 0
        lhs = _operand(computation, instruction, 0).dims
        return 2 * output.size * math.prod(lhs[int(axis)] for axis in json.loads(f"[{contracted}]"))
    if target.startswith("__cudnn$conv"):
        return _convolution(computation, instruction, output)
    declared = instruction.attribute(r'"cost_estimate":\{[^}]*"flops":"?(\d+)')
    return int(declared) if declared else _splash_attention(computation, instruction)


def _splash_attention(computation: Computation, instruction: Instruction) -> int:
    """Operations of JAX's splash attention, which declares none, for one causal document.

    A row of several documents takes fewer, which depends on the data.
    """
    phase = instruction.attribute(r"splash_m[hq]a_(fwd|dq|dkv)_")
    if phase is None:
        return 0
    operands = (computation[name].array for name in instruction.operands)
    heads, length, features = next(x.dims for x in operands if len(x.dims) == 3 and x.dims[2] > 1)
    return {"fwd": 2, "dq": 3, "dkv": 4}[phase] * heads * length**2 * features
