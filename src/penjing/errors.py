"""The one exception a user is meant to read."""


class PenjingError(Exception):
    """Something the user can put right.

    The message is one sentence that names the layer, file or option, what was expected, what was
    found, and what to do. The command line prints it on standard error and exits with code 2.
    """
