"""The exceptions that a user is meant to read, and what another library's says in a line."""


class UserError(Exception):
    """Bad input or a missing requirement, in one line that also says what to change.

    Entry scripts print the message without a traceback and exit with status 2.
    """


class Skipped(UserError):
    """Nothing was tested, because something optional is missing; a run that ends so is neither passed nor failed."""


class Unsupported(UserError):
    """A combination that cannot run here (no kernel, no such granularity); a sweep records it and goes on."""


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
