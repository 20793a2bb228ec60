"""Memory of this process, held now and at its peak since a reset; and the processor that it runs on."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from ..errors import OutOfMemoryError
from ..units import shown

# Address space (limited by RLIMIT_AS, ulimit -v) that torch, diffusers and transformers need to be imported:
# 967 MiB with torch 2.13's CPU wheel. Of the address space after painting on two cores, 753 MiB were not
# resident: mapped files, and 64 MiB that glibc's heap reserves per thread.
IMPORTED = 950 * 2**20
_UNUSED, _THREAD = 500 * 2**20, 64 * 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_GROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class ProcessPeak:
    """Peak resident bytes of this process, exact per stage on Linux (VmHWM, which writing 5 to clear_refs
    resets).

    Other systems report the peak since the process began, so a later stage reports at least what an earlier
    one took; `resets` says which applies.
    """

    def __init__(self) -> None:
        self.resets = self._clear()

    def reset(self) -> None:
        self._clear()

    def bytes(self) -> int:
        if _STATUS.exists():
            match = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
            if match:
                return int(match[1]) * 1024
        if sys.platform == "win32":
            return psutil.Process().memory_info().peak_wset
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    @staticmethod
    def _clear() -> bool:
        try:
            _CLEAR.write_text("5")
        except OSError:  # not Linux, or forbidden by a sandbox: the peak covers the whole process
            return False
        return True


def resident() -> int:
    """Bytes that this process holds now."""
    return psutil.Process().memory_info().rss


def address_space() -> float:
    """Bytes that this process may map, used or not; infinite without RLIMIT_AS."""
    if sys.platform == "win32":
        return math.inf
    import resource

    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    return math.inf if most in (resource.RLIM_INFINITY, -1) else most


def may_hold() -> float:
    """Resident bytes that RLIMIT_AS allows this process, once what it maps without using is taken off."""
    now = psutil.Process().memory_info()
    threads = (psutil.cpu_count(logical=False) or 1) + 2  # torch's, and those of the tokenizer
    return max(0, address_space() - max(_UNUSED + threads * _THREAD, now.vms - now.rss))


def check_address_space() -> None:
    """Raise OutOfMemoryError if the libraries cannot be imported; some of them would abort the process."""
    if address_space() < IMPORTED:
        raise OutOfMemoryError(
            f"out of memory: this process may map {shown(address_space())}, "
            f"torch and diffusers alone take {shown(IMPORTED)}: "
            "raise its limit (ulimit -v)",
            complete=True,
        )


def release() -> None:
    """Return freed heap memory to the system, which glibc would keep.

    Of a text encoder's 469 MiB, 174 stayed resident after it was freed, and 16 after this.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)


# Python with torch, diffusers and transformers, what oneDNN keeps, and holes in the heap. In first runs of
# emoji and of SD 1.5 at 256 and 512, in bf16 and int4, the process held 399 to 598 MiB beyond its tensors
# (`tightfit … --json`, process_bytes less peak_bytes; 2 cores, torch 2.13).
PROCESS = 600 * 2**20


def process_context(resident_bytes: int | None = None) -> int:
    """Bytes that this process takes before any tensor: what it holds now, and 100 MiB for holes in its
    heap."""
    return max(PROCESS, (resident() if resident_bytes is None else resident_bytes) + 100 * 2**20)


def cores() -> float:
    """Cores that this process may keep busy: of the machine's, those that its affinity, its control group and
    OMP_NUM_THREADS leave it."""
    some: list[float] = [psutil.cpu_count(logical=False) or 1, cgroup_cores(_GROUPS, _OWN_GROUP)]
    if hasattr(os, "sched_getaffinity"):
        some.append(len(os.sched_getaffinity(0)))
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if threads.isdecimal() and int(threads):
        some.append(int(threads))
    return min(some)


def cgroup_cores(root: Path, groups_file: Path) -> float:
    """Cores' worth of time that this process's control group and its parents (version 1 or 2) leave it;
    infinite without a quota."""
    folders = (
        group
        for kinds, groups in _groups(root, groups_file)
        if not kinds or "cpu" in kinds.split(",")
        for group in groups
    )
    return min(map(_quota, folders), default=math.inf)


def _quota(group: Path) -> float:
    """Microseconds of CPU time in each period, by the length of a period."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError, ValueError, ZeroDivisionError):  # another version's files, or none
            quota, period = " ".join((group / file).read_text() for file in files).split()
            if quota not in ("max", "-1"):
                return int(quota) / int(period)
    return math.inf


def cpu_name() -> str:
    """The processor's own name, such as 'AMD EPYC'."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """The processor's feature flags by Linux's names; empty on systems that do not report them."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def cpu_memory() -> tuple[int, int]:
    """Total and available bytes of RAM, within the container's limit."""
    memory = psutil.virtual_memory()
    limit, used = cgroup_memory(_GROUPS, _OWN_GROUP)
    allowance = may_hold() - resident()  # by RLIMIT_AS
    if limit is None or limit >= memory.total:
        return memory.total, int(max(0, min(memory.available, allowance)))
    return limit, int(max(0, min(memory.available, limit - used, allowance)))


def cgroup_memory(root: Path, groups_file: Path) -> tuple[int | None, int]:
    """Memory limit of this process's control group (version 1 or 2), or None, and how much of it is used.

    File pages that can be dropped do not count as used.
    """
    for kinds, groups in _groups(root, groups_file):
        if kinds in _CGROUP:
            readings = [limits for group in groups if (limits := _read_cgroup(group, *_CGROUP[kinds]))]
            # The tightest limit of the group and its parents. Inside a container the group's folder is the
            # root.
            if readings:
                return min(readings, key=lambda limits: limits[0] - limits[1])
    return None, 0


def _groups(root: Path, groups_file: Path) -> Iterator[tuple[str, list[Path]]]:
    """The folders of this process's control group and of its parents, by controllers: "" is version 2."""
    try:
        lines = groups_file.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        folder = root / kinds
        own_group = folder / path.strip("/")
        yield kinds, [own_group, *(p for p in own_group.parents if p == folder or folder in p.parents)]


# Files with the limit, the use and the droppable pages, of version 2 and of version 1, by controller.
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
    except (OSError, ValueError, KeyError):  # another version's files, or none
        return None
