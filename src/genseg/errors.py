"""The one error a user is meant to see."""


class UserError(Exception):
    """A mistake in params, data or the command line, told in one line: what is wrong, where, and the remedy.

    The command line prints it without a traceback and exits with code 2. Anything else that escapes is a bug.
    """
