"""The program ``selfsup``: ``selfsup --help`` lists its commands."""

import signal
import sys

from selfsup import _native


def main() -> int:
    """Runs the program with the process's arguments and returns its exit code."""
    # The program handles signals itself: Ctrl-C writes a checkpoint.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return _native.main(["selfsup", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
