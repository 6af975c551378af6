"""Reads a compiled program's text: computations, instructions and shapes with their memory layout.

The text is what `jax.stages.Compiled.as_text()` gives, one partition's program after all optimizations. Only what the cost model asks
for is kept.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"(\w+)\[([\d,<=\s]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(")


@dataclass(frozen=True)
class Shape:
    """An array as it lies in memory.

    Attributes:
      dtype: HLO's name, for example "bf16".
      dims: sizes of the axes.
      order: axes from the fastest varying to the slowest.
      tile: what TPUs pad to: the sizes, slowest first, of the blocks that the fastest axes are cut into; () where there are none.
      space: memory space; 0 is the device's main memory.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def logical_bytes(self) -> int:
        """Bytes without padding."""
        return -(-self.size * _bits(self.dtype) // 8)

    @property
    def bytes(self) -> int:
        """Bytes in memory, padding to whole tiles included."""
        if not self.tile or not self.dims:
            return self.logical_bytes
        sizes = [self.dims[axis] for axis in reversed(self.order)]
        sizes = [1] * (len(self.tile) - len(sizes)) + sizes
        padded = [
            -(-size // tile) * tile
            for size, tile in zip(sizes[-len(self.tile) :], self.tile, strict=True)
        ]
        return math.prod(sizes[: -len(self.tile)]) * math.prod(padded) * _bits(self.dtype) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


ShapeTree = Shape | tuple[Any, ...]
"""The shape of one array, or those of a tuple, which may hold tuples."""


def leaves(tree: ShapeTree) -> Iterator[Shape]:
    """The arrays of a shape that may be a tuple of shapes."""
    if isinstance(tree, Shape):
        yield tree
    else:
        for part in tree:
            yield from leaves(part)


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: unique in the program.
      shape: of its result.
      opcode: what it does.
      operands: names of instructions in the same computation.
      argument: what stands between its parentheses.
      attributes: what follows them.
    """

    name: str
    shape: ShapeTree
    opcode: str
    operands: tuple[str, ...]
    argument: str
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression found in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    def called(self, attribute: str) -> str | None:
        """The name of the computation that an attribute such as `body` names."""
        return self.attribute(rf"\b{attribute}=%([\w.\-]+)")

    @property
    def op_name(self) -> str:
        """The JAX operation that the instruction comes from, with the functions and modules it is in; "" if none is known."""
        return self.attribute(r'op_name="((?:[^"\\]|\\.)*)"') or ""

    @property
    def array(self) -> Shape:
        """The shape of an instruction that gives one array."""
        assert isinstance(self.shape, Shape), f"{self.name} gives a tuple"
        return self.shape


@dataclass
class Computation:
    """Instructions in the order of execution."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    @property
    def parameters(self) -> list[Instruction]:
        """By number."""
        return sorted((i for i in self if i.opcode == "parameter"), key=lambda i: int(i.argument))

    def users(self, name: str) -> list[Instruction]:
        return [i for i in self if name in i.operands]


@dataclass
class Module:
    """A compiled program: all its computations, and the one that is run."""

    computations: dict[str, Computation]
    entry: str

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]


def parse(text: str) -> Module:
    """The program of `Compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and (header := _COMPUTATION.match(line)):
            current = computations[header[2]] = Computation(header[2])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.instructions[found[2]] = _instruction(found[2], line[found.end() :])
            if found[1]:
                current.root = found[2]
    return Module(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opening = text.index("(", end)
    closing = _closing(text, opening)
    argument = text[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", argument))
    return Instruction(
        name, _shape(text[:end]), text[end:opening].strip(), operands, argument, text[closing + 1 :]
    )


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis at `opening` is closed. Layouts hold balanced ones of their own."""
    depth = 0
    for at in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    raise ValueError(f"unbalanced parentheses in {text[:100]!r}")


def _shape(text: str) -> ShapeTree:
    if text.startswith("("):
        parts, depth, start = [], 0, 1
        inner = re.sub(r"/\*.*?\*/", "", text)
        for at, letter in enumerate(inner):
            if depth == 1 and (letter == "," or at == len(inner) - 1):
                parts.append(inner[start:at].strip())
                start = at + 1
            depth += (letter in "([{") - (letter in ")]}")
        return tuple(_shape(part) for part in parts if part)
    found = _ARRAY.fullmatch(text)
    if found is None:
        return Shape("opaque", ())
    dtype, dims, order, layout = found.groups()
    sizes = tuple(int(size.replace("<=", "")) for size in dims.split(",") if size.strip())
    tile = re.search(r"T\(([\d,]+)\)", layout or "")
    space = re.search(r"S\((\d+)\)", layout or "")
    return Shape(
        dtype,
        sizes,
        tuple(int(axis) for axis in order.split(","))
        if order
        else tuple(reversed(range(len(sizes)))),
        tuple(int(size) for size in tile[1].split(",")) if tile else (),
        int(space[1]) if space else 0,
    )


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    return int(re.search(r"\d+", dtype)[0])  # type: ignore[index]
