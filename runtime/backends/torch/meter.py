"""Bytes of live tensors, counted operator by operator, on real tensors and on `meta` ones alike."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import OutOfMemoryError
from ...machine.detect import empty_cache
from ...units import shown
from ..protocol import Meter as Measuring
from .cpu_kernels import CONVOLUTION, own_bytes
from .quantised import gpu_bytes

T = TypeVar("T")


class LiveBytes(TorchDispatchMode):
    """While active, counts the storages that operators allocate, until each is freed. `peak` is the most at
    once.

    Storages that existed before count nothing. Scratch that a kernel frees before it returns is added by
    formula. Above `limit` bytes it raises OutOfMemoryError. `device` is the one whose kernels run, or would
    run.
    """

    def __init__(self, device: str, limit: float = float("inf")) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.device, self.limit = device, limit
        self._alive: dict[int, tuple[int, weakref.ref]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not wrapped so that torch's compiler passes over it, for which torch would import the compiler."""
        return False

    def __exit__(self, *of: Any) -> None:
        super().__exit__(*of)
        self._alive.clear()  # else the weights' weakref callbacks would keep this object alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in(args):
            if (key := tensor.untyped_storage()._cdata) not in self._alive:
                self._made(key, 0, tensor)
        out = self.call(func, args, kwargs or {})
        for tensor in tensors_in((out,)):
            if (key := tensor.untyped_storage()._cdata) not in self._alive:
                self._made(key, tensor.untyped_storage().nbytes(), tensor)
        if scratch_bytes := self.scratch_bytes(func, args, out):
            self.reach(self.now + scratch_bytes)
        return out

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def scratch_bytes(self, func: Any, args: Any, out: Any) -> int:
        """Bytes that the kernel takes beside its output."""
        if self.device == "cpu":
            return own_bytes(func, args, out)
        return (
            cudnn_bytes(args, out)
            if self.device == "cuda" and func is CONVOLUTION
            else gpu_bytes(func, args, out)
        )

    def reach(self, count: int) -> None:
        """Note that `count` bytes are alive at once, for a moment."""
        self.peak = max(self.peak, count)
        if count > self.limit:
            raise OutOfMemoryError(f"{shown(count)} of tensors where {shown(self.limit)} are allowed")

    def _made(self, key: int, count: int, tensor: torch.Tensor) -> None:
        self._alive[key] = count, weakref.ref(tensor.untyped_storage(), lambda _: self._freed(key))
        self.now += count
        self.reach(self.now)

    def _freed(self, key: int) -> None:
        self.now -= self._alive.pop(key, (0, None))[0]


def tensors_in(values: Any) -> list[torch.Tensor]:
    """The strided tensors in `values`, one level of lists and tuples deep, as operators take and return them.
    Opaque ones, such as weights packed by oneDNN, are left out."""
    tensors = []
    for value in values:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            tensors.extend(item for item in value if isinstance(item, torch.Tensor))
    return [tensor for tensor in tensors if tensor.layout is torch.strided]


def cudnn_bytes(args: Any, out: torch.Tensor) -> int:
    """Scratch bytes of a convolution larger than 1x1. In 16 bits cuDNN copies input and output to
    channels-last; in fp32 only the input.

    This explains published peaks beyond the live tensors: 2.59 of 2.616 GiB and 8.84 of 8.958 in bf16, 4.92
    of 4.948 and 16.68 of 16.827 in fp32 (benchmarks/published.toml).
    """
    image, taps = args[0], args[1].shape[2:].numel()
    return 0 if taps == 1 else image.nbytes + (out.nbytes if out.element_size() == 2 else 0)


class Meter(Measuring, Protocol):
    """The part of a backend's meter that its sessions use."""

    def hold(self, count: int) -> None:
        """From now on `count` more bytes of weights or buffers are held; fewer if it is negative."""
        ...

    def during(self, peaks: dict[Hashable, int], key: Hashable, call: Callable[[], T]) -> T:
        """The result of `call`, whose tensors are counted. Calls with the same key have the same peak, which
        is cached in the caller's `peaks`."""
        ...


class CountingMeter:
    """For the CPU, whose allocator can be neither asked nor capped, and for Apple's GPU, which shares its
    memory. Weights are added up as they are loaded. The first call of each shape is counted operator by
    operator; later ones reuse its peak."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._held = self._peak = 0
        self._limit = float("inf")

    def limit(self, count: int | None) -> None:
        self._limit = float("inf") if count is None else count

    def reset(self) -> None:
        self._peak = self._held

    def bytes(self) -> int:
        return self._peak

    def held(self) -> int:
        return self._held

    def hold(self, count: int) -> None:
        if count > 0:
            self._reach(self._held + count)
        self._held += count

    def during(self, peaks: dict[Hashable, int], key: Hashable, call: Callable[[], T]) -> T:
        if key in peaks:
            self._reach(self._held + peaks[key])
            return call()
        live = LiveBytes(self._device, self._limit - self._held)
        try:
            with live:
                out = call()
        finally:
            self._peak = max(self._peak, self._held + live.peak)
        peaks[key] = live.peak
        return out

    def _reach(self, count: int) -> None:
        if count > self._limit:
            raise OutOfMemoryError(f"{shown(count)} of tensors where {shown(self._limit)} are allowed")
        self._peak = max(self._peak, count)


class AllocatorMeter:
    """For CUDA, ROCm and Intel GPUs: what torch's caching allocator has reserved, capped by that allocator
    itself. What others in this process have reserved is subtracted.

    On Windows the driver (WDDM) silently moves what does not fit the card into host memory. That counts as
    out of memory too.
    """

    def __init__(self, device: torch.device) -> None:
        self._torch: Any = getattr(torch, device.type)
        self._device, self._held = device.type, 0
        self._limit: int | None = None
        gc.collect()  # another library's garbage, freed later, would be subtracted from ours
        self._look()

    def limit(self, count: int | None) -> None:
        self._limit = count
        self._look()
        if self._held:
            self._cap()

    def reset(self) -> None:
        self._look()  # a stage is predicted from held bytes, not from the last stage's cache
        self._torch.reset_peak_memory_stats()

    def bytes(self) -> int:
        return max(0, self._torch.max_memory_reserved() - self._others)

    def held(self) -> int:
        return max(0, self._torch.memory_reserved() - self._others)

    def hold(self, count: int) -> None:
        self._held += count

    def _look(self) -> None:
        """Empty the cache. With nothing of ours loaded, also read what others in this process hold and set
        the cap. Libraries' workspaces are not theirs: they count as ours once a product has allocated them.
        """
        if self._held:
            self._torch.empty_cache()
        else:
            empty_cache(self._device)
            self._others = self._torch.memory_reserved()
            self._start = self._state()
            self._cap()

    def _cap(self) -> None:
        total = self._torch.get_device_properties(self._torch.current_device()).total_memory
        share = 1.0
        if self._limit is not None:
            # others may have grown since `_look`, and we cannot free theirs
            most = max(self._limit + self._others, self._torch.memory_reserved() + self._limit - self._held)
            share = min(1.0, (max(0, most) + 1) / total)  # torch truncates, so one byte more
        # Intel's GPUs have it since torch 2.9.
        if cap := getattr(self._torch, "set_per_process_memory_fraction", None):
            cap(share)

    def during(self, peaks: dict[Hashable, int], key: Hashable, call: Callable[[], T]) -> T:  # noqa: ARG002
        out = call()
        if sys.platform == "win32":
            (reserved, used, _), (now_reserved, now_used, free) = self._start, self._state()
            if gone := spilled(now_reserved - reserved, now_used - used, free):
                raise OutOfMemoryError(f"Windows moved {shown(gone)} of the card's memory into the host's")
        return out

    def _state(self) -> tuple[int, int, int]:
        free, total = self._torch.mem_get_info()
        return self._torch.memory_reserved(), total - free, free


# What other programs on the card may allocate or free meanwhile: a guess, no Windows machine was at hand.
SPILL_NOISE = 128 * 2**20


def spilled(reserved: int, used: int, free: int) -> int:
    """Bytes of ours that are not on the card: how much more we reserved since the start than the card's use
    grew. Only a full card spills."""
    missing = reserved - used
    return missing if missing > SPILL_NOISE and free < SPILL_NOISE else 0


def meter(device: torch.device) -> Meter:
    return CountingMeter(device.type) if device.type in ("cpu", "mps") else AllocatorMeter(device)
