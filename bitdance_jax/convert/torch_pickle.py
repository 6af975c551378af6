"""Reads the pickle in a PyTorch file as plain data, without calling or importing anything.

A pickle is a program that can import and call any function. This module reads only the instructions
that torch.save writes, and only the names that a state dict needs: tensors, storages, OrderedDict,
torch.Size, dtypes, and a Namespace of arguments, which becomes a dict. It refuses any other name,
call or instruction.

It also limits the cost of a small pickle: its bytes, its instructions, the time and memory of each
instruction, the size of integers, and the keys of dicts, because integers can be chosen so that
their hashes collide.
"""

import io
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

from bitdance_jax.convert.torch_tensor import STORAGE_TYPES, Storage, Tensor, is_size
from bitdance_jax.errors import FileError, UserError


DTYPES = {
    f"torch.{name}"
    for name in "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
}
NAMESPACES = {"argparse.Namespace", "types.SimpleNamespace"}
CALLABLE = {
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "collections.OrderedDict",
} | NAMESPACES
KNOWN = CALLABLE | DTYPES | STORAGE_TYPES.keys()

MAX_BYTES = 32 * 2**20
"""Size limit of a pickle. The tensors are not in it."""

MAX_INSTRUCTIONS = 2**19
"""Limit of a pickle. The largest released model has a tenth; this many take a second."""

MAX_BITS = 128
"""Limit of an integer. The magic number of legacy files has 77."""

MAX_DIMENSIONS = 32
MAX_ARGUMENTS = 8


HOSTILE = "which no state dict needs; the file may be hostile, nothing was run"


class Refused(FileError):
    """The pickle contains more than data."""


class Global(NamedTuple):
    """A name in the pickle."""

    name: str


class Namespace(dict):
    """The attributes of an argparse.Namespace."""


MARK = object()


def load(
    data: bytes | io.BytesIO, reference: Callable[[Any], Any] = lambda reference: reference
) -> Any:
    """The object in a torch file's pickle: dicts, lists, tuples, scalars, strings and `Tensor`s.

    Args:
      data: the pickle, or a file in memory, which is read up to the end of the pickle.
      reference: converts a storage's persistent id to the five parts that it has in zip files.

    Raises:
      Refused: it has an instruction, a name or a call that no state dict needs (the message names
        it), or too many instructions.
      FileError: it is not a complete pickle.
    """
    machine = _Machine(reference)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name == "STOP":
                return machine.result()
            if count >= MAX_INSTRUCTIONS:
                raise Refused(
                    f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions, {HOSTILE}"
                )
            machine.step(opcode.name, argument)
    except UserError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise FileError(f"its pickle is damaged ({error})") from error
    raise FileError("its pickle is truncated")


class _Machine:
    """The stack and memo of a pickle program."""

    def __init__(self, reference: Callable[[Any], Any]) -> None:
        self.reference = reference
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.duplicates: list[str] = []
        self.copied: dict[int, Any] = {}

    def result(self) -> Any:
        if self.duplicates:
            raise FileError(f"it has duplicate keys: {', '.join(self.duplicates)}")
        return self.stack.pop()

    def step(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _ARGUMENTS:
            if type(argument) is int and argument.bit_length() > MAX_BITS:
                raise ValueError(f"an integer of {argument.bit_length():,} bits")
            self.stack.append(argument)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if not 0 <= argument < MAX_INSTRUCTIONS:
                raise ValueError("an object has too large a number")
            self.memo[argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[int(argument)])
        elif name in _INSTRUCTIONS:
            _INSTRUCTIONS[name](self)
        elif name == "GLOBAL":
            self.stack.append(_global(*argument.rsplit(" ", 1)))
        elif name not in ("PROTO", "FRAME"):
            raise Refused(f"its pickle has the instruction {name}, {HOSTILE}")

    def pop_to_mark(self) -> list[Any]:
        start = len(self.stack) - 1
        while self.stack[start] is not MARK:
            start -= 1
            if start < 0:
                raise ValueError("no mark on the stack")
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("the stack is too short")
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self.stack.append(items)

    def stack_global(self) -> None:
        name = self.stack.pop()
        module = self.stack.pop()
        self.stack.append(_global(module, name))

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("items for something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str and not (type(key) is int and abs(key) < MAX_INSTRUCTIONS):
                raise ValueError(f"a dict has a {type(key).__name__} as its key")
            if key in target:
                self.duplicates.append(str(key))
            target[key] = value

    def append_items(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("items for something that is not a list")
        self.stack[-1].extend(items)

    def set_item(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self.set_items([key, value])

    def append(self) -> None:
        self.append_items([self.stack.pop()])

    def persistent(self) -> None:
        reference = self.stack.pop()
        if type(reference) is not tuple or len(reference) > MAX_ARGUMENTS:
            raise ValueError("a storage is not written as torch does")
        self.stack.append(_storage(self.reference(reference)))

    def reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        self.stack.append(_reduce(function, arguments))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is Namespace and type(state) is dict and not target:
            # Each dict is copied once at most, to bound the cost.
            if id(state) in self.copied:
                raise ValueError("two Namespaces of one dict")
            self.copied[id(state)] = state  # a reference, so that its id is not used again
            target.update(state)
        # PyTorch sets an attribute of an OrderedDict, `_metadata`. It is ignored.
        elif type(target) is not dict:
            raise Refused(f"its pickle sets attributes of a {type(target).__name__}, {HOSTILE}")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "MARK": lambda: MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_ARGUMENTS = set(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT"
    " UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
)
_INSTRUCTIONS: dict[str, Callable[[_Machine], None]] = {
    "MEMOIZE": _Machine.memoize,
    "TUPLE": lambda machine: machine.stack.append(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine: machine.tuple_of(1),
    "TUPLE2": lambda machine: machine.tuple_of(2),
    "TUPLE3": lambda machine: machine.tuple_of(3),
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda machine: machine.set_items(machine.pop_to_mark()),
    "APPEND": _Machine.append,
    "APPENDS": lambda machine: machine.append_items(machine.pop_to_mark()),
    "STACK_GLOBAL": _Machine.stack_global,
    "BINPERSID": _Machine.persistent,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "BUILD": _Machine.build,
}


def _global(module: Any, name: Any) -> Any:
    if type(module) is not str or type(name) is not str:
        raise ValueError("a name that is not a string")
    full = f"{module}.{name}"
    if full not in KNOWN:
        raise Refused(f"its pickle names {full[:200]}, {HOSTILE}")
    return full.removeprefix("torch.") if full in DTYPES else Global(full)


def _storage(reference: Any) -> Storage:
    kind, dtype, key, _, size = reference
    if (
        kind != "storage"
        or type(dtype) is not Global
        or dtype.name not in STORAGE_TYPES
        or type(key) is not str
        or not is_size(size)
    ):
        raise ValueError("a storage is not written as torch does")
    return Storage(STORAGE_TYPES[dtype.name], key, size)


def _is_shape(value: Any) -> bool:
    """Whether it has few dimensions; `Tensor.check` checks their sizes."""
    return type(value) in (list, tuple) and len(value) <= MAX_DIMENSIONS


def _reduce(function: Any, arguments: Any) -> Any:
    """The result of a call, computed here."""
    if (
        type(function) is not Global
        or function.name not in CALLABLE
        or type(arguments) is not tuple
    ):
        what = function.name if type(function) is Global else type(function).__name__
        raise Refused(f"its pickle calls {what}, {HOSTILE}")
    if len(arguments) > MAX_ARGUMENTS:
        raise ValueError(f"{function.name} is called with {len(arguments)} arguments")
    if function.name in NAMESPACES and not arguments:
        return Namespace()
    if function.name == "collections.OrderedDict" and not arguments:
        return {}
    if function.name == "torch.Size" and len(arguments) == 1 and _is_shape(arguments[0]):
        return tuple(arguments[0])
    if function.name == "torch._utils._rebuild_parameter" and type(arguments[0]) is Tensor:
        return arguments[0]
    if function.name == "torch._utils._rebuild_tensor_v2":
        storage, _, shape, stride, *_ = arguments
        if (
            type(storage) is Storage
            and type(shape) is tuple
            and _is_shape(shape)
            and type(stride) is tuple
            and _is_shape(stride)
        ):
            return Tensor(*arguments[:4])
    raise ValueError(f"{function.name} is called with unexpected arguments")
