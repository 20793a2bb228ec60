"""What a card says that it holds, beside what torch says: read at a moment, or watched while something
runs."""

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
# Seconds between two looks; torch's allocator gives nothing back within a stage, so hardly a peak is missed.
_EVERY = 0.01


@dataclass
class Seen:
    """The most bytes seen: `used` of the card, by whomever; `outside` of torch's allocator, so of the context
    and of others."""

    used: int = 0
    outside: int = 0


class Card:
    """The current GPU of `device` (cuda, which is AMD's too), or with cpu this process, whose resident bytes
    are `used`."""

    def __init__(self, device: str) -> None:
        self.device, self.is_gpu = device, device != "cpu"
        self.torch: Any = getattr(torch, device) if self.is_gpu else None

    def read(self) -> tuple[int, int]:
        """`used` and `outside`, of one moment."""
        if not self.is_gpu:
            return resident(), 0
        while True:
            before = self.torch.memory_reserved()
            free, total = self.torch.mem_get_info()
            if self.torch.memory_reserved() == before:  # else torch took or gave back some between the two
                return total - free, total - free - before

    def outside(self) -> int:
        """Bytes of the card that are neither free nor torch's."""
        return self.read()[1]

    @contextmanager
    def watched(self) -> Iterator[Seen]:
        """The most that is seen until the end, by a thread of its own."""
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
        """Give back what nothing uses. Raises what the card says if a kernel broke it for the rest of this
        process."""
        gc.collect()
        if self.is_gpu:
            self.torch.synchronize()
            self.torch.empty_cache()

    def most(self, run: Callable[[], Any]) -> tuple[int, Any]:
        """Bytes that torch allocated at most while `run` ran, beyond those before, and its answer. For
        GPUs."""
        self.clear()
        self.torch.reset_peak_memory_stats()
        before = self.torch.memory_allocated()
        answer = run()
        self.torch.synchronize()
        return self.torch.max_memory_allocated() - before, answer

    def milliseconds(self, run: Callable[[], Any], turns: int = 20) -> float:
        """Of one `run`, on the GPU's own clock, after three that are not counted."""
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
        """Name and size alone, as Hardware.detect would warm up a context that is to be measured bare."""
        name, total = (
            (self.torch.get_device_name(), self.torch.mem_get_info()[1]) if self.is_gpu else (cpu_name(), 0)
        )
        return Hardware(self.device, name, total, total, ("fp32",))
