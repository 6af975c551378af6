"""What the commands share: exit statuses, errors as one line."""

import errno
import io
import logging
import os
import signal
import sys
from collections.abc import Callable

import jax

from bitdance_jax.cli.flags import with_flags
from bitdance_jax.errors import Interrupted, UserError
from bitdance_jax.perf import hardware


LONGEST_MESSAGE = 4000
"""Characters of a message that are printed."""


def run(main: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit status.

    One line on stderr and status 2: a `UserError`, an error of the operating system, a device that
    is missing or whose memory is full. Ctrl-C: one line and status 130. A run that a signal stopped
    after it was saved: one line and the signal's status. Other exceptions are bugs and pass.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see cli.main
        signal.signal(signal.SIGINT, signal.default_int_handler)
    quiet_orbax()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Print names with letters that the output's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = main() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        if isinstance(error, OSError):
            _drop_output()
        return 2


def one_line(error: Exception) -> str | None:
    """What is printed of an error that is not a bug, with flags for fields; None for a bug."""
    message = _message(error)
    return None if message is None else _printable(message)


def quiet_orbax() -> None:
    """Suppresses the tracebacks that Orbax logs for errors that it also raises.

    After a failed read or write, other operations of TensorStore fail too, or find the event loop
    closed, each with a traceback.
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


def _is_retrieved(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _message(error: Exception) -> str | None:
    if isinstance(error, UserError):
        return with_flags(error)
    if isinstance(error, OSError):
        return _system_error(error)
    if isinstance(error, jax.errors.JaxRuntimeError):
        if "RESOURCE_EXHAUSTED" not in str(error):
            return None
        reason = str(error).splitlines()[0]
        return f"a device's memory is full ({reason}); make the batch or the images smaller"
    if isinstance(error, AssertionError | RuntimeError):  # JAX raises either for missing devices
        return hardware.missing_devices()
    return None


def _system_error(error: OSError) -> str:
    if error.errno == errno.ENAMETOOLONG:
        return f"a name is too long: {error.filename}"
    try:
        os.getcwd()
    except OSError:
        return "the current folder does not exist any more; change to another one"
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is not None:
        return f"{error.filename}: {reason}"
    if error.errno in (errno.EPIPE, errno.ENOSPC, errno.EBADF):
        return f"cannot write, perhaps to the output: {reason}"
    return reason


def _drop_output() -> None:
    """Discards text that could not be printed, so that Python does not try again when it exits."""
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return
    try:
        sys.stdout.flush()
    except OSError:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


def _printable(message: str) -> str:
    """The message, shortened, with control characters (of a quoted file, for example) escaped."""
    text = "".join(
        char if char.isprintable() else repr(char)[1:-1] for char in message[:LONGEST_MESSAGE]
    )
    return f"{text} ... ({len(message):,} characters)" if len(message) > LONGEST_MESSAGE else text
