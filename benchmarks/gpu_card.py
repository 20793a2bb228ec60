"""Memory in use by the driver's count and by torch's: at one moment, or watched during a run."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..runtime.machine.detect import cpu_name
from ..runtime.machine.hardware import Hardware
from ..runtime.machine.process import resident

MIB = 2**20
# Seconds between readings. torch's allocator returns nothing within a stage, so hardly a peak is missed.
_EVERY = 0.01


@dataclass
class Seen:
    """Peak bytes seen: `used` on the card by anyone; `outside` torch's allocator, so contexts and other
    programs."""

    used: int = 0
    outside: int = 0


class Card:
    """The current GPU of `device` (AMD's is cuda too). With cpu it is this process, whose resident bytes are
    `used`."""

    def __init__(self, device: str) -> None:
        self.device, self.is_gpu = device, device != "cpu"
        self.torch: Any = getattr(torch, device) if self.is_gpu else None

    def read(self) -> tuple[int, int]:
        """`used` and `outside` at one moment."""
        if not self.is_gpu:
            return resident(), 0
        while True:
            before = self.torch.memory_reserved()
            free, total = self.torch.mem_get_info()
            if self.torch.memory_reserved() == before:  # else torch changed it in between
                return total - free, total - free - before

    def outside(self) -> int:
        """Bytes on the card that are neither free nor torch's."""
        return self.read()[1]

    @contextmanager
    def watched(self) -> Iterator[Seen]:
        """Context manager: a thread watches the card and keeps the peaks."""
        seen, over = Seen(), threading.Event()

        def look() -> None:
            while True:
                used, outside = self.read()
                seen.used, seen.outside = max(seen.used, used), max(seen.outside, outside)
                if over.wait(_EVERY):
                    return

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield seen
        finally:
            over.set()
            watcher.join()

    def clear(self) -> None:
        """Return unused memory. Raises the card's error if a kernel broke it for the rest of this process."""
        gc.collect()
        if self.is_gpu:
            self.torch.synchronize()
            self.torch.empty_cache()

    def most(self, run: Callable[[], Any]) -> tuple[int, Any]:
        """Peak bytes that torch allocated while `run` ran, beyond those before, and its result. GPUs only."""
        self.clear()
        self.torch.reset_peak_memory_stats()
        before = self.torch.memory_allocated()
        answer = run()
        self.torch.synchronize()
        return self.torch.max_memory_allocated() - before, answer

    def milliseconds(self, run: Callable[[], Any], turns: int = 20) -> float:
        """Milliseconds per `run` by the GPU's own clock, after three warm-up runs."""
        for _ in range(3):
            run()
        start, end = (self.torch.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(turns):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / turns

    def name(self) -> Hardware:
        """Name and size only: Hardware.detect would warm up a context that is to be measured bare."""
        name, total = (
            (self.torch.get_device_name(), self.torch.mem_get_info()[1]) if self.is_gpu else (cpu_name(), 0)
        )
        return Hardware(self.device, name, total, total, ("fp32",))
