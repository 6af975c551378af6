"""What the command-line tools show as a single line."""

import reprlib


class UserError(ValueError):
    """Bad input. The message is one line that names the thing and the mend; the tools print it and exit with status 2."""


class Interrupted(BaseException):
    """A signal stopped the run, which is saved. Nothing has failed: `except Exception` lets it pass.

    Attributes:
      exit_code: the shell's for that signal: 128 + its number.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def short(value: object) -> str:
    """A value from outside for a message: its `repr` on one line, with the middle left out of what is long, deep or in circles."""
    try:
        return " ".join(_SHORT.repr(value).split())
    except ValueError:  # Python 3.11 writes no integer of more than 4300 digits.
        return "a number of too many digits"


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
