"""Errors that a user can act on: one clear line on stderr, and an exit code."""


class UserError(Exception):
    """A run that cannot go on for a reason outside this code. The message is one line: what, and what would be right.

    `exit_code` is 1 for what fails while running (data, checkpoints, the disk) and 2, set by subclasses, for arguments
    and configurations that were wrong before anything ran.
    """

    exit_code = 1


class ArgumentError(UserError, ValueError):
    """A command line that cannot be understood."""

    exit_code = 2
