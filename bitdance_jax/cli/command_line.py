"""What the command-line tools share: flags from a dataclass, one line for bad input, and compiled programs that are kept."""

import contextlib
import dataclasses
import difflib
import errno
import io
import logging
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import tyro

from bitdance_jax.config.plain import IS_PATH, checked, field_types
from bitdance_jax.errors import UserError
from bitdance_jax.io import paths
from bitdance_jax.perf import hardware


T = TypeVar("T")

LONGEST_MESSAGE = 4000
"""Characters of a message that are printed."""


def parse(
    arguments: type[T],
    flags: Sequence[str] | None = None,
    default: T | None = None,
    prog: str | None = None,
) -> T:
    """The dataclass filled in from the command line (default: this process's), `default` giving what is not named.

    Fields that are a `config.plain.PathName` are as `files.named` gives them.

    Raises:
      UserError: an unknown flag, with the nearest known one, or a value that is missing or of another type.
    """
    flags = sys.argv[1:] if flags is None else flags
    extra: dict[str, Any] = {} if default is None else {"default": default}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):  # tyro frames its complaint over several lines
            parsed, unknown = tyro.cli(
                arguments, args=list(flags), prog=prog, return_unknown_args=True, **extra
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        # What the dataclass itself says stands behind its name, which is no flag.
        raise UserError(
            _one_line(complaint.getvalue()).removeprefix(f"Error parsing {arguments.__name__}: ")
        ) from None
    if unknown:
        known = [
            "--" + name.replace("_", "-")
            for name in _flag_names(arguments if default is None else default)
        ]
        nearest = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"unknown flag {unknown[0]}{hint} (--help lists them all)")
    return _with_paths(parsed)


class Flags:
    """Base of the commands' arguments, frozen dataclasses: each is checked against its type, as in a config."""

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():  # type: ignore[arg-type]
            flag = "--" + name.replace("_", "-")
            object.__setattr__(self, name, checked(hint, getattr(self, name), flag))


def is_given(name: str, flags: Sequence[str]) -> bool:
    """Whether a flag such as "model.num-classes" is among those of a command line."""
    return any(flag.partition("=")[0].replace("_", "-") == f"--{name}" for flag in flags)


def run(main: Callable[[], int | None]) -> int:
    """The exit status of a tool: bad input, a device whose memory is full or that is not there, and what the system
    refuses are one line on stderr and status 2, Ctrl-C one and 130."""
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    ):  # so that the imports end without a traceback
        signal.signal(signal.SIGINT, signal.default_int_handler)
    quiet_orbax()
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # names that its encoding lacks are printed all the same
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = main() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {_printable(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {_printable(_system_error(error))}", file=sys.stderr)
        _drop_output()
        return 2
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            f"error: a device's memory is full ({str(error).splitlines()[0]}); make the batch or the images smaller",
            file=sys.stderr,
        )
        return 2
    except (
        AssertionError,
        RuntimeError,
    ):  # JAX's complaint about a device that is not there may be either
        missing = hardware.missing_devices()
        if missing is None:
            raise
        print(f"error: {_printable(missing)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def keep_compiled(folder: str) -> None:
    """Keeps the programs that JAX compiles from here on in a folder, local or gs://, and takes those that are there.

    Of several processes the first one alone writes, and all read: the folder must be one that all of them see.

    Raises:
      UserError: it cannot be made.
    """
    jax.config.update("jax_compilation_cache_dir", str(paths.make_folder(folder)))
    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs", 0.0
    )  # The small ones, left out otherwise, add up to a second.


def _is_retrieved(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def quiet_orbax() -> None:
    """Keeps a tool's output to its own lines: Orbax logs, with tracebacks, errors that it also raises.

    After a failed read or write, TensorStore's other ones fail too, or find the event loop closed, each
    with a traceback of its own.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(_is_retrieved)
    hook = sys.unraisablehook
    if getattr(hook, "quiet", False):
        return

    def quiet(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    quiet.quiet = True  # type: ignore[attr-defined]
    sys.unraisablehook = quiet


def _system_error(error: OSError) -> str:
    """One line of what the system refused and nobody has put into words."""
    if error.errno == errno.ENAMETOOLONG:
        return f"a name is too long: {error.filename}"
    try:
        os.getcwd()
    except OSError:
        return "the current folder is not there any more; go to another one"
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is not None:
        return f"{error.filename}: {reason}"
    if error.errno in (errno.EPIPE, errno.ENOSPC, errno.EBADF):
        return f"cannot write, perhaps to where the output goes: {reason}"
    return reason


def _drop_output() -> None:
    """What could not be printed is not tried again when Python ends."""
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return
    try:
        sys.stdout.flush()
    except OSError:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


def _with_paths(config: Any) -> Any:
    hints = field_types(type(config))  # type: ignore[arg-type]
    changes = {}
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if dataclasses.is_dataclass(value):
            changes[field.name] = _with_paths(value)
        elif isinstance(value, str) and any(
            IS_PATH in getattr(kind, "__metadata__", ()) for kind in (hint, *typing.get_args(hint))
        ):
            changes[field.name] = paths.expand(value)
    return dataclasses.replace(config, **changes) if changes else config


def _flag_names(config: Any, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name, None)
        nested = dataclasses.is_dataclass(value) and not isinstance(value, type)
        names += _flag_names(value, f"{prefix}{field.name}.") if nested else [prefix + field.name]
    return names


def _printable(message: str) -> str:
    """One line without control characters: what a message quotes of a file may hold some, and a list of keys may have no end."""
    text = "".join(
        char if char.isprintable() else repr(char)[1:-1] for char in message[:LONGEST_MESSAGE]
    )
    return f"{text} ... ({len(message):,} characters)" if len(message) > LONGEST_MESSAGE else text


def _one_line(complaint: str) -> str:
    """What tyro's box says, without its title, its frame (drawn in ASCII on some terminals) and its pointer to --help."""
    _, *lines = (line.strip("│╭╮╰╯ ") for line in complaint.splitlines())
    words = " ".join(line for line in lines if line.strip("─-"))
    line = re.split("For full helptext|Argument helptext", words)[0].strip() or complaint.strip()
    # Of a flag that may be None, tyro says why each of the two types does not fit, in Python's words.
    either = (
        r"no type matching \{None\}\|(\S+) could be instantiated from \[(.*?)\]\. Got errors:.*"
    )
    return re.sub(either, r"\2 is no \1", line)
