"""The first instant of a local worker: bind its life to the launcher's, then become the command.

Run as `python -m nested_reft_mcore.launch.worker LAUNCHER_PID COMMAND [ARGUMENT ...]`.
"""

import os
import signal
import sys

from nested_reft_mcore.launch.parent import die_with_parent


def main(argv: list[str]) -> None:
    """Replace this process by the command, tied to the launcher."""
    die_with_parent(int(argv[0]))
    # A stop that arrives before the program listens must not kill it; the launcher repeats it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.stdout.flush()
    os.execvp(argv[1], argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
