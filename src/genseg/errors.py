"""The exception for mistakes that a user can correct."""


class UserError(Exception):
    """A mistake in params, data or the command line: one line with the place, the problem and the remedy.

    The command line prints it without a traceback and exits with code 2. Any other exception that escapes is a bug.
    """
