"""Training configs: those of the package by name, and a user's own Python files.

A config file has a function `get_config` that returns a TrainingConfig. Parameters of the function
are flags, with their defaults.
"""

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from bitdance_jax.cli.flags import is_given, parse, split
from bitdance_jax.configs import SHIPPED
from bitdance_jax.errors import FileError, UserError
from bitdance_jax.io import paths, readers
from bitdance_jax.train.task import TrainingConfig


def load_config(name: str, flags: Sequence[str] = ()) -> tuple[TrainingConfig, list[str]]:
    """A config, and the flags that are not parameters of its `get_config`.

    Args:
      name: of a config of the package, such as "emoji_4x" or "configs/emoji_4x.py", or the path of
        a Python file.
      flags: of the command line.

    Raises:
      FileError: there is no such config, or the file raises an error or returns something else.
      ConfigError: a bad value of a parameter.
    """
    path = paths.expand(name)
    shipped = _shipped_name(path)
    values: dict[str, Any] = {}
    if shipped is None:
        module = _load_file(path)
    else:
        file, values = SHIPPED[shipped]
        module = importlib.import_module(f"bitdance_jax.configs.{file}")
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise FileError(f"{path} has no function get_config", path)
    try:
        fields = _parameters(get_config)
    except Exception as error:  # Annotations may be any Python.
        raise _failure(path, error) from error
    given, rest = _given(fields, flags)
    try:
        config = get_config(**values | given)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if shipped is not None and isinstance(error, UserError):
            raise
        raise _failure(path, error) from error
    if not isinstance(config, TrainingConfig):
        kind = type(config).__name__
        raise FileError(f"{path}: get_config() must return a TrainingConfig, got {kind}", path)
    return config, rest


def _shipped_name(path: str) -> str | None:
    """The name of a config of the package; "configs/NAME.py" is one where there is no such file."""
    if path in SHIPPED:
        return path
    folder, file = os.path.split(path)
    name = file.removesuffix(".py")
    is_shipped = folder == "configs" and name in SHIPPED and not os.path.exists(path)
    return name if is_shipped else None


def _load_file(path: str) -> ModuleType:
    try:
        readers.check_file(path)
    except readers.MissingFile as error:
        nearest = difflib.get_close_matches(Path(path).stem, SHIPPED, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"the package has {', '.join(SHIPPED)}"
        raise FileError(f"no config file {path}; {hint}", path) from error
    spec = importlib.util.spec_from_file_location("training_config", path)
    if spec is None or spec.loader is None:
        raise FileError(f"{path} is not a Python file", path)
    module = importlib.util.module_from_spec(spec)
    # tyro looks up the source of the file's classes by their module. Worker processes cannot import
    # it, so they get the classes themselves.
    sys.modules[spec.name] = module
    cloudpickle.register_pickle_by_value(module)
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _failure(path, error) from error
    return module


def _failure(path: str, error: BaseException) -> FileError:
    """The error of a config file that raises one; SystemExit too, as a script does."""
    return FileError(f"{path}: {type(error).__name__}: {error}", path)


def _parameters(get_config: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """The parameters of `get_config` that have a default, as fields of a dataclass."""
    hints = typing.get_type_hints(get_config)
    return [
        (name, hints.get(name, str), dataclasses.field(default=parameter.default))
        for name, parameter in inspect.signature(get_config).parameters.items()
        if parameter.default is not parameter.empty
    ]


def _given(
    fields: list[tuple[str, Any, Any]], flags: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """The values of the parameters that are among the flags, and the other flags."""
    own, rest = split(flags, [name for name, _, _ in fields])
    if not own:
        return {}, rest
    parsed: Any = parse(dataclasses.make_dataclass("Parameters", fields), own)
    return {name: getattr(parsed, name) for name, _, _ in fields if is_given(name, own)}, rest
