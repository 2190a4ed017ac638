"""Errors that are said in one line: what a user is expected to cause and to mend, and what failed beside this program."""


class InputError(ValueError):
    """Bad input, said in one line: what is wrong, where, and what would be right.

    Commands print the line and exit with code 64; nothing has been written when it is raised.
    """


class EngineDiedError(RuntimeError):
    """A serving engine ended, or failed in a way that a fresh one may not. Commands print the line and exit with 70."""


class TruncatedError(RuntimeError):
    """ANOMALOUS: a server did not read, or did not write, what it was asked to. Commands print the line and exit with 12."""
