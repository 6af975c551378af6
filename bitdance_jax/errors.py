"""What the command-line tools show as a single line."""


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
