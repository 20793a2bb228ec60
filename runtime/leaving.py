"""The end of a command: what Python does in a second, once nothing of it is needed."""

import atexit
import os
import sys
import threading


def leave(code: int) -> None:
    """End the process, once threads have ended and all has been written and told, in Python's order. Returns
    where Python has to end it: where an output cannot be written, which Python then says.

    Python searches torch, diffusers and transformers for cycles, and takes them apart module by module, which
    took 1.1 s of a command of five. What Triton's bindings keep they then report as leaks: 30 lines.
    """
    wait = getattr(threading, "_shutdown", None)  # which also ends the idle threads of pools
    tell = getattr(atexit, "_run_exitfuncs", None)
    if wait is None or tell is None or _is_watched():
        return
    wait()
    tell()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        return
    os._exit(code)


def _is_watched() -> bool:
    """Whether a profiler or a debugger looks on, which has something to say at the end."""
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    tools = [monitoring.get_tool(number) for number in range(6)] if monitoring else []
    return bool(sys.gettrace() or sys.getprofile() or any(tools))
