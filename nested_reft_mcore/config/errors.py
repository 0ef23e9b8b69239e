"""The one exception that means "the user has to change something"."""


class UserError(Exception):
    """A mistake in what the user gave: config, file, data line, checkpoint or parallel sizes.

    The message names the file, line or key, says what was found and what was expected. The command
    line prints it without a traceback and exits with code 2.
    """


def reason_of(error: OSError) -> str:
    """Why the system refuses, for a message; libraries raise OSErrors that have a text alone."""
    return error.strerror or str(error) or type(error).__name__
