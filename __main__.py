"""The one door of the command line: `tightfit` and `python -m tightfit`. Importing this imports nothing that takes time."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command. Ctrl-C before there is anything to tidy up ends it at once, with the usual line and exit code."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell's background jobs ignore it
    if ours:
        signal.signal(signal.SIGINT, _stop)
    try:
        from .runtime.cli import main as run
    except (ImportError, MemoryError, OSError, RuntimeError) as error:
        from .runtime.errors import first_line, out_of_memory

        if not out_of_memory(error):
            raise
        os.write(2, f"tightfit: out of memory while it was starting ({first_line(error)}): close what else uses it\n".encode())
        sys.exit(2)

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _stop(_number: int, _frame: FrameType | None) -> None:
    os.write(2, b"tightfit: stopped\n")
    os._exit(130)  # an exception would be lost, or reworded, in a library that is being imported


if __name__ == "__main__":
    main()
