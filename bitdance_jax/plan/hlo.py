"""Parses a compiled program: computations, instructions, and shapes with their memory layout.

The text is the result of `jax.stages.Compiled.as_text()`: the program of one device after all
optimizations.
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
    """An array and its layout in memory.

    Attributes:
      dtype: HLO's name, for example "bf16".
      dims: sizes of the axes.
      order: axes from the fastest varying to the slowest.
      tile: sizes, slowest first, of the tiles to which TPUs pad the fastest axes; () if there are
        none.
      space: memory space; 0 is the device's main memory.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def logical_bytes(self) -> int:
        """Bytes without padding."""
        return -(-self.size * _bits(self.dtype) // 8)

    @property
    def bytes(self) -> int:
        """Bytes in memory, with the padding to full tiles."""
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
"""The shape of an array, or of the elements of a tuple, which may be tuples."""


def leaves(tree: ShapeTree) -> Iterator[Shape]:
    """The shapes of all arrays in a tree."""
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
      opcode: HLO's name of the operation.
      operands: names of instructions in the same computation.
      argument: the text in its parentheses.
      attributes: the text after them.
    """

    name: str
    shape: ShapeTree
    opcode: str
    operands: tuple[str, ...]
    argument: str
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression in the attributes; None if it is not found."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    def called(self, attribute: str) -> str | None:
        """The computation in an attribute such as `body`."""
        return self.attribute(rf"\b{attribute}=%([\w.\-]+)")

    @property
    def op_name(self) -> str:
        """The JAX operation of the instruction, with its functions and modules; "" if unknown."""
        return self.attribute(r'op_name="((?:[^"\\]|\\.)*)"') or ""

    @property
    def array(self) -> Shape:
        """The shape of the result, which must not be a tuple."""
        assert isinstance(self.shape, Shape), f"the result of {self.name} is a tuple"
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
        """In the order of their numbers."""
        return sorted((i for i in self if i.opcode == "parameter"), key=lambda i: int(i.argument))

    def users(self, name: str) -> list[Instruction]:
        return [i for i in self if name in i.operands]


@dataclass
class Module:
    """A compiled program: its computations, and the name of the one that runs first."""

    computations: dict[str, Computation]
    entry: str

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]


def parse(text: str) -> Module:
    """Parses the text of `Compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    # The metadata of a kernel have line breaks within an instruction.
    text = text.replace('{\n"', '{"').replace('"\n}}', '"}}')
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and (header := _COMPUTATION.match(line)):
            current = Computation(header[2])
            computations[header[2]] = current
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
    """The index of the parenthesis that closes the one at `opening`. Layouts contain others."""
    depth = 0
    for at in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    raise ValueError(f"unbalanced parentheses in {text[:100]!r}")


def _shape(text: str) -> ShapeTree:
    if text.startswith("("):
        parts = []
        depth = 0
        start = 1
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
    default = tuple(reversed(range(len(sizes))))
    return Shape(
        dtype,
        sizes,
        order=tuple(int(axis) for axis in order.split(",")) if order else default,
        tile=tuple(int(size) for size in tile[1].split(",")) if tile else (),
        space=int(space[1]) if space else 0,
    )


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    return int(re.search(r"\d+", dtype)[0])  # type: ignore[index]
