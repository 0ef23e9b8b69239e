"""What the exit code of every command means."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `nested-reft`; launchers and Slurm scripts act on them."""

    OK = 0
    FAILURE = 1
    """A check failed, or an internal error."""
    USER_ERROR = 2
    """The user has to change something: configuration, data, checkpoint or parallel sizes."""
    PREFLIGHT = 3
    """A node is bad."""
    PEER_LOST = 4
    """Another process left or hangs."""
    COME_BACK = 75
    """Stopped on request with everything saved: start the same command again to go on."""
