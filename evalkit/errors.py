"""The one error that a user is expected to cause and to mend."""


class InputError(ValueError):
    """Bad input, said in one line: what is wrong, where, and what would be right.

    Commands print the line and exit with code 64; nothing has been written when it is raised.
    """
