"""Flags from a dataclass, and the names of its fields as flags in error messages."""

import contextlib
import dataclasses
import difflib
import io
import re
import sys
import typing
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeVar

import tyro

from bitdance_jax.config.plain import IS_PATH, field_types, require
from bitdance_jax.errors import ConfigError, UserError
from bitdance_jax.io import paths


T = TypeVar("T")


_known_flags: dict[str, str] = {}
"""The flag of each field that this process has parsed flags for."""


def parse(
    arguments: type[T],
    flags: Sequence[str] | None = None,
    default: T | None = None,
    prog: str | None = None,
) -> T:
    """The dataclass with the values of the command line.

    Args:
      arguments: fields of type `config.plain.PathName` pass through `paths.expand`. `ALIASES` of
        the class maps library names to the fields that set them, for messages.
      flags: the command line; None: that of this process.
      default: gives the fields without a flag.
      prog: what the help calls the command.

    Raises:
      ConfigError: an unknown flag, with the nearest known one, or a missing or bad value.
    """
    flags = sys.argv[1:] if flags is None else flags
    _describe_each_field(arguments)
    known = {name: _flag(name, hint) for name, hint in _fields(arguments)}
    _known_flags.update(known)
    for alias, name in getattr(arguments, "ALIASES", {}).items():
        _known_flags[alias] = known[name]
    extra: dict[str, Any] = {} if default is None else {"default": default}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):  # tyro prints a box of several lines
            parsed, unknown = tyro.cli(
                arguments, args=list(flags), prog=prog, return_unknown_args=True, **extra
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise _bad_flags(_one_line(complaint.getvalue()), stop) from None
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], known.values(), n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        kind = "flag" if unknown[0].startswith("-") else "argument"
        if kind == "argument" and "checkpoint" in known:
            hint = f"; if it is a model, give --checkpoint {unknown[0]}"
        raise ConfigError(f"unknown {kind} {unknown[0]}{hint} (--help lists them all)")
    return _with_paths(parsed)


def is_given(field: str, flags: Sequence[str]) -> bool:
    """Whether a command line sets a field such as "model.num_classes"."""
    return any(_field_of(flag) == field for flag in flags)


def split(flags: Sequence[str], fields: Collection[str]) -> tuple[list[str], list[str]]:
    """The flags of these fields with their values, and all others."""
    parts: tuple[list[str], list[str]] = ([], [])
    is_own = False
    for flag in flags:
        if flag.startswith("-"):
            is_own = _field_of(flag) in fields
        parts[0 if is_own else 1].append(flag)
    return parts


def _field_of(flag: str) -> str | None:
    if flag == "-h":
        return "help"
    return flag[2:].partition("=")[0].replace("-", "_") if flag.startswith("--") else None


def with_flags(error: UserError, config: str = "") -> str:
    """The message of an error, with the names of fields as the flags of this command.

    `mesh.tensor` becomes `--mesh.tensor`, `force=True` `--force` and `ch_mult=(1, 2)`
    `--ch-mult 1 2`. A name that is a common word, without a dot or underscore, is replaced only if
    it has a value, or is the error's `field` and starts the message.

    Args:
      config: the field that holds the config whose fields the message names, such as "run".
    """
    prefix = f"{config}." if config else ""
    inner = {
        name.removeprefix(prefix): flag
        for name, flag in _known_flags.items()
        if name.startswith(prefix)
    }
    flags = _known_flags | inner
    field = (getattr(error, "field", None) or "").partition("[")[0]  # Of an entry: of all.
    names = sorted(flags, key=len, reverse=True)
    words = [name for name in names if "." in name or "_" in name]
    if not names:
        return str(error)
    value = r"('[^']*'|\([\d., ]*\)|[\w.]*\w)"
    pattern = rf"(?<![\w./-])(?:({_any(names)})={value}|({_any(words)}))(?![\w/=])(?!\.\w)"

    def flag(match: re.Match[str]) -> str:
        name, value, word = match.groups()
        if word:
            return flags[word]
        if value == "True":
            return flags[name]
        if value == "False":
            return re.sub(r"([^.-]+(?:-[^.-]+)*)$", r"no-\1", flags[name])
        words = value.strip("'").strip("()").replace(",", " ").split()
        return " ".join([flags[name], *words])

    message = re.sub(pattern, flag, str(error))
    if field in flags and re.match(rf"{field}\b(?![.=])", message):
        message = flags[field] + message.removeprefix(field)
    return message


def _any(names: Sequence[str]) -> str:
    return "|".join(map(re.escape, names)) or r"(?!)"


def _fields(config: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a dataclass and of those in it, by their full names, with their types."""
    for name, hint in field_types(config).items():
        nested = next(_nested(hint), None)
        if nested is None:
            yield prefix + name, hint
        else:
            yield from _fields(nested, f"{prefix}{name}.")


def _nested(hint: Any) -> Iterator[type]:
    """The dataclasses in a field's type."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from _nested(part)


def _describe_each_field(config: type) -> None:
    """Repeats a description of several fields, "start, end: times", for each of them.

    It changes the docstrings of the dataclass, its subclasses, and those in it, where tyro looks
    for a field's help by its name alone.
    """

    def separate(match: re.Match[str]) -> str:
        indent, names, text = match.groups()
        return "\n".join(f"{indent}{name}:{text}" for name in names.split(", "))

    for part in (*config.__mro__[:-1], *config.__subclasses__()):
        several = r"^( +)(\w+(?:, \w+)+):(.*(?:\n\1 +.*)*)"
        part.__doc__ = re.sub(several, separate, part.__doc__ or "", flags=re.MULTILINE)
    for hint in field_types(config).values():
        for nested in _nested(hint):
            _describe_each_field(nested)


def _flag(name: str, hint: Any) -> str:
    if tyro.conf.Positional in getattr(hint, "__metadata__", ()):
        return name.upper()
    return "--" + name.replace("_", "-")


def _bad_flags(line: str, stop: SystemExit) -> UserError:
    """The error of flags that tyro refuses: of a config in the arguments, if one raised it."""
    cause: BaseException | None = stop
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__context__
    if cause is None:
        return ConfigError(line)
    if not isinstance(cause, ConfigError):
        return cause
    match = re.match(r"Error parsing ([\w.]+): ", line)
    config = match[1] if match else ""
    if not any(name.startswith(f"{config}.") for name in _known_flags):
        config = ""
    field = f"{config}.{cause.field}" if config and cause.field else cause.field
    return ConfigError(with_flags(cause, config), field)


def _with_paths(config: Any, prefix: str = "") -> Any:
    hints = field_types(type(config))  # type: ignore[arg-type]
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        hint = hints[field.name]
        kinds = (hint, *typing.get_args(hint))
        if dataclasses.is_dataclass(value):
            changes[field.name] = _with_paths(value, f"{prefix}{field.name}.")
        elif not any(IS_PATH in getattr(kind, "__metadata__", ()) for kind in kinds):
            continue
        elif isinstance(value, str):
            changes[field.name] = _expanded(value, prefix + field.name)
        elif isinstance(value, tuple):
            changes[field.name] = tuple(_expanded(path, prefix + field.name) for path in value)
    return dataclasses.replace(config, **changes) if changes else config


def _expanded(path: str, field: str) -> str:
    require(path != "", f"{field} is empty; name a path", field)
    return paths.expand(path)


def _one_line(complaint: str) -> str:
    """The text of tyro's box, without its title, its frame and its pointer to --help."""
    _, *lines = (line.strip("│╭╮╰╯ ") for line in complaint.splitlines())
    words = " ".join(line for line in lines if line.strip("─-"))  # "-" on terminals without UTF-8
    line = re.split("For full helptext|Argument helptext", words)[0].strip() or complaint.strip()
    # For a flag that may be None, tyro explains in Python's words why neither type fits.
    either = (
        r"no type matching \{None\}\|(\S+) could be instantiated from \[(.*?)\]\. Got errors:.*"
    )
    return re.sub(either, r"\2 is no \1", line)
