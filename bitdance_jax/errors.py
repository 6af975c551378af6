"""Errors that a user can fix; the commands print their message as a single line."""

import os
import reprlib


class UserError(ValueError):
    """Base of the errors that a user can fix. The commands exit with status 2.

    The message is one line that names the cause and the fix. It writes the names of arguments and
    of config fields as in Python (`batch_size`, `mesh.tensor`, `force=True`); the commands print
    them as flags (`--batch-size`, `--mesh.tensor`, `--force`).
    """


class ConfigError(UserError):
    """An argument or a configuration that cannot work.

    Attributes:
      field: the name of the argument or field, such as "batch_size" or "mesh.tensor"; None if no
        single one is at fault.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class FileError(UserError):
    """A file or folder that is missing or damaged, or cannot be read or written.

    Attributes:
      path: its path as the user gave it, if known.
    """

    def __init__(self, message: str, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else os.fspath(path)


class ResourceError(UserError):
    """Too little memory on the devices or the host, or too little space on the disk."""


class Interrupted(BaseException):
    """A signal stopped a run after it was saved. `except Exception` does not catch it.

    Attributes:
      exit_code: as shells report the signal: 128 + its number.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def short(value: object) -> str:
    """The `repr` of a value on one line, abbreviated, for a message."""
    try:
        return " ".join(_SHORT.repr(value).split())
    except ValueError:  # Python 3.11 prints no integer of more than 4300 digits.
        return "a number with too many digits"


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = 60
_SHORT.maxother = 60
_SHORT.maxlong = 60
