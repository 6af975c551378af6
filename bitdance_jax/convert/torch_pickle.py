"""The pickle inside a torch file, read as plain data: nothing in it is ever called or imported.

A pickle is a little program that may name any function and call it. This reads the few instructions that torch.save writes, and knows by
name the few things that a state dict needs: tensors, storages, OrderedDict, torch.Size, dtypes, and a Namespace of arguments, which becomes
a dict. Any other name, call or instruction is refused.

Nor may a small pickle cost much: its bytes and instructions are counted, each instruction takes a bounded time and memory, numbers are
bounded, and so are the keys of dicts, for whose integers one can choose the hashes.
"""

import io
import math
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from bitdance_jax.errors import FileError, UserError, short


STORAGES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
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
KNOWN = CALLABLE | DTYPES | STORAGES.keys()

MAX_BYTES = 32 * 2**20
"""Of a pickle, which holds no tensors' numbers."""

MAX_INSTRUCTIONS = 2**19
"""Of a pickle. The largest released model's takes about a tenth, and so many take a second."""

MAX_BITS = 128
"""Of an integer. The number that opens legacy files has 77."""

MAX_DIMENSIONS = 32
MAX_ARGUMENTS = 8

MAX_REPEATED = 2**20
"""Elements of a tensor that has more of them than its storage: PyTorch can save what `expand` made of a few numbers."""


class Refused(FileError):
    """The pickle asks for more than data."""


class Storage(NamedTuple):
    """Numbers in the file: the record `data/{key}`, `size` of them."""

    dtype: np.dtype
    key: str
    size: int


class Tensor(NamedTuple):
    """A view of a storage; offset and stride count numbers, not bytes. Nothing of it is checked before `check`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def check(self) -> None:
        """Raises a UserError if the view is impossible or reaches outside of its storage."""
        storage, offset, shape, stride = self
        described = f"sizes {short(shape)}, strides {short(stride)}, offset {short(offset)}"
        if not all(_is_size(size) for size in [storage.size, offset, *shape, *stride]) or len(
            shape
        ) != len(stride):
            raise UserError(f"a tensor of storage {short(storage.key)} has impossible {described}")
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if 0 not in shape and last >= storage.size:
            raise UserError(
                f"a tensor reaches outside its storage {short(storage.key)}: {described}"
            )
        if math.prod(shape) > max(storage.size, MAX_REPEATED):
            raise UserError(
                f"a tensor repeats its storage {short(storage.key)} too often: {described}"
            )

    def view(self, numbers: np.ndarray) -> np.ndarray:
        """The tensor, of the storage's numbers; `check` it first."""
        strides = [step * self.storage.dtype.itemsize for step in self.stride]
        return np.lib.stride_tricks.as_strided(
            numbers[self.offset :], self.shape, strides, writeable=False
        )


class Global(NamedTuple):
    """A name that the pickle mentions."""

    name: str


class Namespace(dict):
    """The attributes of an argparse.Namespace."""


MARK = object()


def load(
    data: bytes | io.BytesIO, reference: Callable[[Any], Any] = lambda reference: reference
) -> Any:
    """The object in a torch file's pickle: dicts, lists, tuples, scalars, strings and `Tensor`s.

    Args:
      data: the pickle, or a file in memory that is read up to the pickle's end.
      reference: turns a storage's persistent id into the five parts that zip files give it.

    Raises:
      Refused: an instruction, a name or a call that no state dict needs; it says which. More instructions than any needs.
      UserError: not a complete pickle.
    """
    machine = _Machine(reference)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name == "STOP":
                return machine.result()
            if count >= MAX_INSTRUCTIONS:
                raise Refused(
                    f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions, which no state dict needs; the file may be hostile"
                )
            machine.step(opcode.name, argument)
    except UserError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"its pickle is damaged ({error})") from error
    raise UserError("its pickle is cut short")


class _Machine:
    """The stack and memory of a pickle program."""

    def __init__(self, reference: Callable[[Any], Any]) -> None:
        self.reference = reference
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.duplicates: list[str] = []
        self.copied: dict[int, Any] = {}

    def result(self) -> Any:
        if self.duplicates:
            raise UserError(f"it has a second key {', a second key '.join(self.duplicates)}")
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
                raise ValueError("it numbers more objects than it can have")
            self.memo[argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[int(argument)])
        elif name in _INSTRUCTIONS:
            _INSTRUCTIONS[name](self)
        elif name == "GLOBAL":
            self.stack.append(_global(*argument.rsplit(" ", 1)))
        elif name not in ("PROTO", "FRAME"):
            raise Refused(
                f"its pickle has the instruction {name}, which no state dict needs; the file may be hostile, nothing was run"
            )

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
            raise ValueError("too little on the stack")
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self.stack.append(items)

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_global(module, name))

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("items for something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str and not (type(key) is int and abs(key) < MAX_INSTRUCTIONS):
                raise ValueError(
                    f"a dict has a {type(key).__name__} as its key, and not a string or a small number"
                )
            if key in target:
                self.duplicates.append(str(key))
            target[key] = value

    def append_items(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("items for something that is not a list")
        self.stack[-1].extend(items)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def append(self) -> None:
        self.append_items([self.stack.pop()])

    def persistent(self) -> None:
        reference = self.stack.pop()
        if type(reference) is not tuple or len(reference) > MAX_ARGUMENTS:
            raise ValueError("a storage is not written as torch does")
        self.stack.append(_storage(self.reference(reference)))

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(_reduce(function, arguments))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Namespace and type(state) is dict and not target:
            self.take(state)
            target.update(state)
        elif (
            type(target) is not dict
        ):  # of an OrderedDict: torch's `_metadata`, versions of modules
            raise Refused(
                f"its pickle sets attributes of a {type(target).__name__}; the file may be hostile, nothing was run"
            )

    def take(self, state: dict[Any, Any]) -> None:
        """A copy costs what the state's length is, and each state is copied once: into its Namespace."""
        if id(state) in self.copied:
            raise ValueError("two Namespaces of one dict")
        self.copied[id(state)] = state  # kept, so that its id stays its own


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
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
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
        raise Refused(
            f"its pickle names {full[:200]}, which no state dict needs; the file may be hostile, nothing was run"
        )
    return full.removeprefix("torch.") if full in DTYPES else Global(full)


def _storage(reference: Any) -> Storage:
    kind, dtype, key, _, size = reference
    if (
        kind != "storage"
        or type(dtype) is not Global
        or dtype.name not in STORAGES
        or type(key) is not str
        or not _is_size(size)
    ):
        raise ValueError("a storage is not written as torch does")
    return Storage(STORAGES[dtype.name], key, size)


def _is_shape(value: Any) -> bool:
    """Not of its numbers: `Tensor.check` looks at them."""
    return type(value) in (list, tuple) and len(value) <= MAX_DIMENSIONS


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _reduce(function: Any, arguments: Any) -> Any:
    """What the few known calls would make."""
    if (
        type(function) is not Global
        or function.name not in CALLABLE
        or type(arguments) is not tuple
    ):
        what = function.name if type(function) is Global else type(function).__name__
        raise Refused(
            f"its pickle calls {what}, which no state dict needs; the file may be hostile, nothing was run"
        )
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
    raise ValueError(f"{function.name} is called with other arguments than torch's")
