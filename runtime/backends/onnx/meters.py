"""Bytes that ONNX Runtime holds, as the operating system and the driver report them."""

from __future__ import annotations

from typing import Any

from ...errors import OutOfMemoryError
from ...machine.process import ProcessPeak, resident
from ...units import shown


class ProcessMeter:
    """For the CPU provider, whose allocator reports nothing: how much this process has grown since nothing
    was loaded."""

    def __init__(self) -> None:
        self._process, self._limit, self._held = ProcessPeak(), None, 0
        self._start, self._used = resident(), False

    def limit(self, count: int | None) -> None:
        self._limit = count

    def reset(self) -> None:
        if not self._held:
            self._start = resident()
        self._process.reset()
        self._used = self._held > 0

    def look(self) -> None:
        """Nothing to do here. A device that keeps no peak is read after each call."""

    def bytes(self) -> int:
        return max(0, self._process.bytes() - self._start) if self._used else 0

    def held(self) -> int:
        return self._held

    def hold(self, count: int) -> None:
        self._held += count
        self._used = True

    def room(self) -> int | None:
        """Bytes left below the limit, or None without a limit."""
        return None if self._limit is None else max(0, self._limit - self._held)

    def reach(self, count: int) -> None:
        """Raise OutOfMemoryError if `count` more bytes do not fit beside what is held."""
        room = self.room()
        if room is not None and count > room:
            raise OutOfMemoryError(
                f"{shown(self._held + count)} are needed where {shown(self._held + room)} are allowed"
            )


class DeviceMeter(ProcessMeter):
    """For a GPU's provider: memory in use by the driver's count since nothing was loaded, read after each
    call."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device, self._peak = device, 0
        self._free = self._now()

    def reset(self) -> None:
        if not self._held:
            self._free = self._now()
        self._peak = 0
        self.look()

    def bytes(self) -> int:
        self.look()
        return self._peak

    def look(self) -> None:
        self._peak = max(self._peak, self._free - self._now())

    def _now(self) -> int:
        """Free bytes on the device; 0 if the driver does not report them."""
        import torch

        module: Any = getattr(torch, self._device, None)
        return (
            int(module.mem_get_info()[0]) if hasattr(module, "mem_get_info") and module.is_available() else 0
        )
