"""Two kinds of error: what the user can mend (`UserError`: one sentence and a hint) and bugs (any other exception)."""


class UserError(Exception):
    """Something the user can mend; printed without a traceback, exit code 1.

    Args:
        message: one sentence that says what is wrong, with the names involved.
        hint: the command or the change that mends it; may be empty.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(UserError):
    """The command line itself is wrong; exit code 2."""
