"""How much memory this process holds, and held at most since it was last asked."""

from __future__ import annotations

import ctypes
import math
import re
import sys
from pathlib import Path

import psutil

from ..errors import OutOfMemoryError
from ..units import shown

# Address space, which RLIMIT_AS (ulimit -v) bounds, of torch, diffusers and transformers once they are
# imported: 967 MiB of torch 2.13's CPU wheel. Of that and what came by painting on two cores, 753 were not
# resident: mapped files, and 64 that glibc's heap reserves for each thread.
IMPORTED = 950 * 2**20
_UNUSED, _THREAD = 500 * 2**20, 64 * 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class ProcessPeak:
    """Peak resident bytes of this process, exact per stage on Linux (VmHWM, which writing 5 to clear_refs
    resets).

    Elsewhere the operating system only tells the peak since the process began, so a later stage reports at
    least what an earlier one took; `resets` says which of the two holds.
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
    """Raise OutOfMemoryError where the libraries cannot be imported, as some of them abort the process
    then."""
    if address_space() < IMPORTED:
        raise OutOfMemoryError(
            f"out of memory: this process may map {shown(address_space())}, "
            f"torch and diffusers alone take {shown(IMPORTED)}: "
            "raise its limit (ulimit -v)",
            complete=True,
        )


def release() -> None:
    """Give freed heap memory back to the system, where the C library (glibc) would keep it.

    Of 469 MiB of a text encoder 174 stayed resident after it was freed, and 16 after this.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)


# Python with torch, diffusers and transformers, what oneDNN keeps, and the holes in the heap: what the
# process held beyond its tensors was 399 to 598 MiB in first runs of emoji and of SD 1.5 at 256 and 512, in
# bf16 and int4 (`tightfit … --json`, process_bytes less peak_bytes; 2 cores, torch 2.13).
PROCESS = 600 * 2**20


def process_context(own: int | None = None) -> int:
    """Bytes that this process takes before any tensor, from those that it holds now: 100 MiB more for the
    holes in its heap."""
    return max(PROCESS, (resident() if own is None else own) + 100 * 2**20)


def cpu_memory() -> tuple[int, int]:
    """Total and available bytes of RAM, as far as the container may use them."""
    memory = psutil.virtual_memory()
    limit, used = cgroup_memory(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    own = may_hold() - resident()  # by RLIMIT_AS
    if limit is None or limit >= memory.total:
        return memory.total, int(max(0, min(memory.available, own)))
    return limit, int(max(0, min(memory.available, limit - used, own)))


def cgroup_memory(root: Path, own: Path) -> tuple[int | None, int]:
    """The memory limit of this process's control group (version 1 or 2), None without one, and what it uses
    of that.

    Pages of files that can be dropped do not count as used.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return None, 0
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds in _CGROUP:
            folder = root / kinds
            own_group = folder / path.strip("/")
            groups = [own_group, *(p for p in own_group.parents if p == folder or folder in p.parents)]
            found = [limits for group in groups if (limits := _read_cgroup(group, *_CGROUP[kinds]))]
            # The tightest of the group and those it is in; inside a container its own folder is the root.
            if found:
                return min(found, key=lambda limits: limits[0] - limits[1])
    return None, 0


# The files that tell limit, use and pages that can be dropped: of version 2 and version 1, by the
# controllers' name.
_CGROUP = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _read_cgroup(place: Path, limit_file: str, used_file: str, inactive_name: str) -> tuple[int, int] | None:
    try:
        limit = (place / limit_file).read_text().strip()
        used = int((place / used_file).read_text())
        rows = dict(row.split() for row in (place / "memory.stat").read_text().splitlines())
        return None if limit == "max" else (int(limit), max(0, used - int(rows[inactive_name])))
    except (OSError, ValueError, KeyError):  # another version's files, or none here
        return None
