"""Ctrl-C: ends the process at once, or raises KeyboardInterrupt where something is to be tidied up. Imports
next to nothing."""

import os
import signal


def at_once() -> None:
    """Until `tidily` is called, and again once all is done: an exception would be lost, or reworded, in a
    library that is being imported, or printed with a traceback while Python ends."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, _stop)


def tidily() -> None:
    """From here on there is something to finish or to remove."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(_number: int, _frame: object) -> None:
    os.write(2, b"tightfit: stopped\n")
    os._exit(130)
