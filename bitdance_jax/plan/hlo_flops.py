"""Floating-point operations of HLO instructions. Only products count, two for each multiply-add, as in `bitdance_jax.perf.flops`."""

import itertools
import json
import math
import re

from bitdance_jax.plan.hlo import Computation, Instruction, Module, Shape, leaves


def flops(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Operations of one execution; of everything inside, for a fusion."""
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
    """How often a TPU's matrix unit, which multiplies bfloat16, goes over an instruction's products: 6 times in precision "highest"."""
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
    return (
        2
        * instruction.array.size
        * math.prod(lhs[int(axis)] for axis in contracted.split(",") if axis)
    )


def _convolution(computation: Computation, instruction: Instruction, output: Shape) -> int:
    """A multiply-add counts where the kernel meets an input, not where it meets padding or the holes of a dilated input.

    TPUs write products of matrices as convolutions, and batches of such products as windows with more padding than input.
    """
    lhs, rhs = (_operand(computation, instruction, i) for i in (0, 1))
    labels = instruction.attribute(r"dim_labels=([\w>\-]+)") or ""
    lhs_labels, rhs_labels, out_labels = re.split("_|->", labels)
    window = dict(
        re.findall(r"(\w+)=([\dx_\-]+)", instruction.attribute(r"window=\{([^}]*)\}") or "")
    )
    meetings = 1
    for number in range(len(lhs_labels) - 2):
        sides = ((lhs, lhs_labels), (rhs, rhs_labels), (output, out_labels))
        size, kernel, out = (shape.dims[text.index(str(number))] for shape, text in sides)
        meetings *= _meetings(size, kernel, out, window, number)
    features_in, features_out = rhs.dims[rhs_labels.index("i")], output.dims[out_labels.index("f")]
    batch_groups = int(instruction.attribute(r"batch_group_count=(\d+)") or 1)
    return (
        2 * meetings * features_in * features_out * lhs.dims[lhs_labels.index("b")] // batch_groups
    )


def _meetings(size: int, kernel: int, out: int, window: dict[str, str], axis: int) -> int:
    """How many pairs of output and kernel positions along one axis read an element of the input."""

    def option(name: str, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    stride, base, dilation = (
        int(option(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")
    )
    before = int(option("pad", "0_0").split("_")[0])
    if (stride, base, dilation, before) == (1, 1, 1, 0) and out == size - kernel + 1:
        return out * kernel
    places = (
        k * dilation + o * stride - before for k, o in itertools.product(range(kernel), range(out))
    )
    return sum(place % base == 0 and 0 <= place // base < size for place in places)


def _custom_call(computation: Computation, instruction: Instruction) -> int:
    """Products that a compiler hands to a library, or that a kernel says it makes."""
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
    return int(instruction.attribute(r'"cost_estimate":\{[^}]*"flops":"?(\d+)') or 0)
