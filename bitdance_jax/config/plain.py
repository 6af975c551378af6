"""Configs as plain data and back, and the error of one that cannot work."""

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

from bitdance_jax.errors import UserError


T = TypeVar("T")


class ConfigError(UserError):
    """A configuration that cannot work; the message names the field and the mend in one line."""


def require(condition: bool, message: str) -> None:
    """Raises a ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON-ready data."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], data: dict[str, Any], where: str = "config") -> T:
    """The config that `to_dict` wrote; unknown, missing and ill-typed fields are ConfigErrors that name them."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be an object, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    require(not unknown, f"{where} has unknown fields: {', '.join(unknown)}; known: {', '.join(fields)}")
    missing = [
        name
        for name, f in fields.items()
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    require(not missing, f"{where} lacks the fields: {', '.join(missing)}")
    return cls(**{name: _decode(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    if origin is Literal:
        require(value in args, f"{where} must be one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where} must be a list, got {value!r}")
        return tuple(_decode(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _decode(next(a for a in args if a is not type(None)), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    require(isinstance(value, hint) and (hint is bool or not isinstance(value, bool)), f"{where} must be {hint.__name__}, got {value!r}")
    return value
