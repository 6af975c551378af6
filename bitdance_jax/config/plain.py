"""Base of all configs: checks of fields, and conversion to and from plain data."""

import dataclasses
import functools
import math
import numbers
import operator
import os
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from bitdance_jax.errors import ConfigError, short


T = TypeVar("T")

IS_PATH = "path"
PathName = Annotated[str, IS_PATH]
"""Type of flags and of config fields that are paths; `cli.flags.parse` expands them."""


class Range(NamedTuple):
    """Limits of a number, as in `Annotated[float, Range(0, 1)]`.

    Attributes:
      low, high: the limits.
      above, below: whether `low`, or `high`, itself is excluded.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __str__(self) -> str:
        if self.above or self.below:
            if math.isinf(self.high):
                return f"more than {self.low}"
            first = "(" if self.above else "["
            last = ")" if self.below else "]"
            return f"in {first}{self.low}, {self.high}{last}"
        return (
            f"at least {self.low}"
            if math.isinf(self.high)
            else f"between {self.low} and {self.high}"
        )

    def check(self, value: float, where: str) -> None:
        """Raises a ConfigError for a number outside."""
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        if low and high:
            return
        expected = f"be {self}"
        if not low and self.high > 1 and self.low == (0 if self.above else 1):
            expected = "be positive"
        elif not low and self.low == 0 and math.isinf(self.high):
            expected = "not be negative"
        raise ConfigError(f"{where} must {expected}, got {short(value)}", where)


class OneOf:
    """Choices of a name, as in `Annotated[str, OneOf(table)]`: keys of a table that may grow."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        """While the table is empty, any name passes: its module is not imported yet."""
        self.table = table

    def check(self, value: str, where: str) -> None:
        """Raises a ConfigError for another name."""
        known = not self.table or value in self.table
        names = ", ".join(self.table)
        require(known, f"{where} must be one of {names}, got {short(value)}", where)


Size = Annotated[int, Range(1, 2**20)]
"""Size or number of layers. No model comes near the limits; damaged files do."""

Depth = Annotated[int, Range(1, 1024)]
"""Number of layers that are traced, or looked up in a file, one by one."""

Count = Annotated[int, Range(1, 2**31 - 1)]
Natural = Annotated[int, Range(0, 2**31 - 1)]
BatchSize = Annotated[int, Range(1, 2**16)]
"""Number of images at a time."""

HeadSteps = Annotated[int, Range(1, 10_000)]
ImageSide = Annotated[int, Range(1, 2**13)]
"""In pixels."""

Seed = Annotated[int, Range(0, 2**32 - 1)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, below=True)]


class Config:
    """Base of all configs, which are frozen dataclasses.

    Each field is checked against its type when a config is made.
    """

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():  # type: ignore[arg-type]
            object.__setattr__(self, name, checked(hint, getattr(self, name), name))


def require(condition: bool, message: str, field: str | None = None) -> None:
    """Raises a ConfigError with the message, about the field, unless the condition holds."""
    if not condition:
        raise ConfigError(message, field)


class Tagged(Config):
    """Base of configs of several kinds, which are subclasses of one direct subclass.

    In plain data the entry "kind" names the kind; the one declared without a kind has no entry.
    """

    kind: ClassVar[str | None]
    kinds: ClassVar[dict[str | None, type["Tagged"]]]

    def __init_subclass__(cls, kind: str | None = None) -> None:
        if Tagged in cls.__bases__:
            cls.kinds = {}
            return
        cls.kind = kind
        cls.kinds[kind] = cls


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON-ready data."""
    fields = {
        field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)
    }
    kind = config.kind if isinstance(config, Tagged) else None
    return fields if kind is None else {"kind": kind, **fields}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return to_dict(value) if dataclasses.is_dataclass(value) else value


def from_dict(cls: type[T], data: dict[str, Any], where: str = "config") -> T:
    """The config that `to_dict` returned as data.

    Args:
      cls: type of the config.
      data: see there.
      where: name of the data in messages.

    Raises:
      ConfigError: unknown, missing or ill-typed fields; the message names them.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be a {cls.__name__}, got {type(data).__name__}", where)
    if issubclass(cls, Tagged):
        data = dict(data)
        cls = _of_kind(cls, data.pop("kind", None), f"{where}.kind")
    hints = field_types(cls)  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(hints))
    require(
        not unknown, f"{where} has unknown fields: {', '.join(unknown)}; known: {', '.join(hints)}"
    )
    missing = [
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.name not in data
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    require(not missing, f"{where} lacks the fields: {', '.join(missing)}")
    return cls(
        **{name: checked(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    )


def _of_kind(cls: type[Tagged], kind: Any, where: str) -> Any:
    known = isinstance(kind, str | None) and kind in cls.kinds
    names = ", ".join(name for name in cls.kinds if name is not None)
    require(known, f"{where} must be one of {names}, got {short(kind)}", where)
    return cls.kinds[kind]


def checked(hint: Any, value: Any, where: str) -> Any:
    """The value as stored in a field: numpy's numbers as Python's, lists as tuples, dicts as
    configs.

    Args:
      hint: type of the field.
      value: to be stored.
      where: name of the field in messages.

    Raises:
      ConfigError: the value is of another type, not one of the choices, or out of range.
    """
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin is Annotated:
        value = checked(args[0], value, where)
        for mark in args[1:]:
            if isinstance(mark, Range | OneOf):
                mark.check(value, where)
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return checked(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        known = any(isinstance(value, type(choice)) and value == choice for choice in args)
        require(
            known, f"{where} must be one of {', '.join(map(str, args))}, got {short(value)}", where
        )
        return value
    if origin is tuple:
        require(
            isinstance(value, list | tuple), f"{where} must be a list, got {short(value)}", where
        )
        count = len(value) if Ellipsis in args else len(args)
        require(
            len(value) == count, f"{where} must have {count} entries, got {short(value)}", where
        )
        return tuple(checked(args[0], entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    return _scalar(hint, value, where)


def _scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = _finite(value)
        require(number is not None, f"{where} must be a finite number, got {short(value)}", where)
        return number
    if hint is int and not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} must be {hint.__name__}, got {short(value)}", where)
    return value


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, with their annotations."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}
