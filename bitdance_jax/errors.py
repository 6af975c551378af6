"""The one exception type that the command-line tools show as a single line."""


class UserError(ValueError):
    """Bad input. The message is one line that names the thing and the mend; the tools print it and exit with status 2."""
