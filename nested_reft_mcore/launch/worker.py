"""The first instant of a local worker: bind its life to the launcher's, then become the command.

Run as `python -m nested_reft_mcore.launch.worker LAUNCHER_PID COMMAND [ARGUMENT ...]`.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies, however it dies; survives an exec.

    Raises:
        SystemExit: the parent is gone already.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            print(f"prctl: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
    if os.getppid() != parent:
        raise SystemExit(128 + signal.SIGKILL)


def main(argv: list[str]) -> None:
    """Replace this process by the command, tied to the launcher."""
    die_with_parent(int(argv[0]))
    # A stop that arrives before the program listens must not kill it; the launcher repeats it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.stdout.flush()
    os.execvp(argv[1], argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
