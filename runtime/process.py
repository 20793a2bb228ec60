"""How much memory this process holds, and held at most since it was last asked."""

from __future__ import annotations

import ctypes
import math
import re
import sys
from pathlib import Path

import psutil

from .errors import OutOfMemoryError
from .memory import shown

# Address space, which RLIMIT_AS (ulimit -v) bounds, of torch, diffusers and transformers once they are imported: 967 MiB of torch
# 2.13's CPU wheel. Of that and what came by painting on two cores, 753 were not resident: mapped files, and 64 that glibc's heap
# reserves for each thread.
IMPORTED = 950 * 2**20
_UNUSED, _THREAD = 500 * 2**20, 64 * 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class ProcessPeak:
    """Peak resident bytes of this process, exact per stage on Linux (VmHWM, which writing 5 to clear_refs resets).

    Elsewhere the operating system only tells the peak since the process began, so a later stage reports at least what
    an earlier one took; `resets` says which of the two holds.
    """

    def __init__(self) -> None:
        self.resets = self._clear()

    def reset(self) -> None:
        self._clear()

    def bytes(self) -> int:
        if _STATUS.exists():
            found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
            if found:
                return int(found[1]) * 1024
        if sys.platform == "win32":
            return psutil.Process().memory_info().peak_wset
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    @staticmethod
    def _clear() -> bool:
        try:
            _CLEAR.write_text("5")
        except OSError:  # not Linux, or a sandbox that forbids it: the peak then covers the whole process
            return False
        return True


def resident() -> int:
    """Bytes that this process holds now."""
    return psutil.Process().memory_info().rss


def address_space() -> float:
    """Bytes that this process may map, used or not; infinite where no RLIMIT_AS is set."""
    if sys.platform == "win32":
        return math.inf
    import resource

    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    return math.inf if most in (resource.RLIM_INFINITY, -1) else most


def may_hold() -> float:
    """Bytes that RLIMIT_AS lets this process hold in all, beside what it maps and does not use."""
    now = psutil.Process().memory_info()
    threads = (psutil.cpu_count(logical=False) or 1) + 2  # torch's, and those of the tokenizer
    return max(0, address_space() - max(_UNUSED + threads * _THREAD, now.vms - now.rss))


def check_address_space() -> None:
    """Raise OutOfMemoryError where the libraries cannot be imported, as some of them abort the process then."""
    if address_space() < IMPORTED:
        raise OutOfMemoryError(
            f"out of memory: this process may map {shown(address_space())}, torch and diffusers alone take {shown(IMPORTED)}: "
            "raise its limit (ulimit -v)"
        )


def release() -> None:
    """Give freed heap memory back to the system, where the C library (glibc) would keep it.

    Of 469 MiB of a text encoder 174 stayed resident after it was freed, and 16 after this.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)
