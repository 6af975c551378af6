"""The pickle inside a torch file, read as plain data: nothing in it is ever called or imported.

A pickle is a little program that may name any function and call it. This reads the few instructions that torch.save writes, and knows by
name the few things that a state dict needs: tensors, storages, OrderedDict, torch.Size, dtypes, and a Namespace of arguments, which becomes
a dict. Any other name, call or instruction is refused.
"""

import pickletools
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from bitdance_jax.errors import UserError


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
DTYPES = {f"torch.{name}" for name in "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()}
NAMESPACES = {"argparse.Namespace", "types.SimpleNamespace"}
CALLABLE = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.Size", "collections.OrderedDict"} | NAMESPACES

MAX_DIMENSIONS = 32


class Refused(UserError):
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
        sizes = [storage.size, offset, *shape, *stride]
        if not all(type(size) is int and 0 <= size < 2**62 for size in sizes) or len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
            raise UserError(f"a tensor of storage {storage.key!r} has impossible sizes {shape}, strides {stride} or offset {offset}")
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if 0 not in shape and last >= storage.size:
            raise UserError(f"a tensor reaches outside its storage {storage.key}: sizes {shape}, strides {stride}, offset {offset}")

    def view(self, numbers: np.ndarray) -> np.ndarray:
        """The tensor, of the storage's numbers; `check` it first."""
        strides = [step * self.storage.dtype.itemsize for step in self.stride]
        return np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, strides, writeable=False)


class Global(NamedTuple):
    """A name that the pickle mentions."""

    name: str


class Namespace(dict):
    """The attributes of an argparse.Namespace."""


MARK = object()


def load(data: bytes | IO[bytes], reference: Callable[[Any], Any] = lambda reference: reference) -> Any:
    """The object in a torch file's pickle: dicts, lists, tuples, scalars, strings and `Tensor`s.

    Args:
      data: the pickle, or a file that is read up to the pickle's end.
      reference: turns a storage's persistent id into the five parts that zip files give it.

    Raises:
      Refused: an instruction, a name or a call that no state dict needs; it says which.
      UserError: not a complete pickle.
    """
    machine = _Machine(reference)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.result()
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

    def result(self) -> Any:
        if self.duplicates:
            raise UserError(f"it has a second key {', a second key '.join(self.duplicates)}")
        return self.stack.pop()

    def step(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _ARGUMENTS:
            self.stack.append(argument)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[int(argument)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[int(argument)])
        elif name in _INSTRUCTIONS:
            _INSTRUCTIONS[name](self)
        elif name == "GLOBAL":
            self.stack.append(_global(*argument.rsplit(" ", 1)))
        elif name not in ("PROTO", "FRAME"):
            raise Refused(f"its pickle has the instruction {name}, which no state dict needs; the file may be hostile, nothing was run")

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
            if not isinstance(key, str | int | float | None):
                raise ValueError(f"a dict has a {type(key).__name__} as its key")
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
        self.stack.append(_storage(self.reference(self.stack.pop())))

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(_reduce(function, arguments))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Namespace and type(state) is dict and not target:
            target.update(state)
        elif type(target) is not dict:  # of an OrderedDict: torch's `_metadata`, versions of modules
            raise Refused(f"its pickle sets attributes of a {type(target).__name__}; the file may be hostile, nothing was run")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "MARK": lambda: MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_ARGUMENTS = set("INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8".split())
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
    full = f"{module}.{name}"
    if full not in CALLABLE | DTYPES | STORAGES.keys():
        raise Refused(f"its pickle names {full}, which no state dict needs; the file may be hostile, nothing was run")
    return full.removeprefix("torch.") if full in DTYPES else Global(full)


def _storage(reference: Any) -> Storage:
    kind, dtype, key, _, size = reference
    if kind != "storage" or type(dtype) is not Global or dtype.name not in STORAGES or type(key) is not str or type(size) is not int:
        raise ValueError("a storage is not written as torch does")
    return Storage(STORAGES[dtype.name], key, size)


def _reduce(function: Any, arguments: Any) -> Any:
    """What the few known calls would make."""
    if type(function) is not Global or function.name not in CALLABLE or type(arguments) is not tuple:
        what = function.name if type(function) is Global else type(function).__name__
        raise Refused(f"its pickle calls {what}, which no state dict needs; the file may be hostile, nothing was run")
    if function.name in NAMESPACES and not arguments:
        return Namespace()
    if function.name == "collections.OrderedDict" and not arguments:
        return {}
    if function.name == "torch.Size":
        return tuple(*arguments)
    if function.name == "torch._utils._rebuild_parameter" and type(arguments[0]) is Tensor:
        return arguments[0]
    if function.name == "torch._utils._rebuild_tensor_v2":
        storage, _, shape, stride, *_ = arguments
        if type(storage) is Storage and type(shape) is tuple and type(stride) is tuple:
            return Tensor(*arguments[:4])
    raise ValueError(f"{function.name} is called with other arguments than torch's")
