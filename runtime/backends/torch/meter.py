"""How many bytes of tensors are alive: counted operator by operator, on real tensors and on `meta` ones
alike."""

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
    """Counts the storages that operators make while it is on, from their making to their end; `peak` is the
    most at once.

    Storages that were there before count nothing. What a kernel takes for itself and gives back before it
    returns is known for the CPU's. Above `limit` bytes OutOfMemoryError is raised. `device` is the one whose
    kernels run, or will.
    """

    def __init__(self, device: str, limit: float = float("inf")) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.device, self.limit = device, limit
        self._alive: dict[int, tuple[int, weakref.ref]] = {}

    def __exit__(self, *of: Any) -> None:
        super().__exit__(*of)
        self._alive.clear()  # weights live on: what waits for their end would stay as long, and this with it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in(args):
            if (key := tensor.untyped_storage()._cdata) not in self._alive:
                self._made(key, 0, tensor)
        out = self.call(func, args, kwargs or {})
        for tensor in tensors_in((out,)):
            if (key := tensor.untyped_storage()._cdata) not in self._alive:
                self._made(key, tensor.untyped_storage().nbytes(), tensor)
        if own := self.own(func, args, out):
            self.reach(self.now + own)
        return out

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def own(self, func: Any, args: Any, out: Any) -> int:
        """Bytes the kernel takes beside its answer."""
        if self.device == "cpu":
            return own_bytes(func, args, out)
        return (
            cudnn_bytes(args, out)
            if self.device == "cuda" and func is CONVOLUTION
            else gpu_bytes(func, args, out)
        )

    def reach(self, count: int) -> None:
        """Note that `count` bytes are alive together, for a moment."""
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
    """The tensors among `values`, one level of lists and tuples deep, as operators take and return them; but
    none that is opaque, as weights that oneDNN packed are."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(each for each in value if isinstance(each, torch.Tensor))
    return [tensor for tensor in found if tensor.layout is torch.strided]


def cudnn_bytes(args: Any, out: torch.Tensor) -> int:
    """Bytes that a convolution larger than 1x1 takes beside its answer: in 16 bits input and answer once
    more, as cuDNN's kernels there want channels_last and it copies; in fp32 the input.

    That is what published peaks are above the tensors alive: by it 2.59 GiB of 2.616 and 8.84 of 8.958 in
    bf16, 4.92 of 4.948 and 16.68 of 16.827 in fp32 (benchmarks/published.toml).
    """
    image, taps = args[0], args[1].shape[2:].numel()
    return 0 if taps == 1 else image.nbytes + (out.nbytes if out.element_size() == 2 else 0)


class Meter(Measuring, Protocol):
    """What sessions tell their backend's meter."""

    def hold(self, count: int) -> None:
        """`count` more bytes of weights or buffers are held from now on; fewer, if it is negative."""
        ...

    def during(self, known: dict[Hashable, int], key: Hashable, call: Callable[[], T]) -> T:
        """The answer of `call`, whose tensors count. Calls of one key take the same: the caller keeps `known`
        for that."""
        ...


class CountingMeter:
    """For the CPU, whose allocator can neither be asked nor capped, and for Apple's GPU, which shares its
    memory: weights are added up as they are held, and the first call of each kind is counted operator by
    operator; the next take the same."""

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

    def during(self, known: dict[Hashable, int], key: Hashable, call: Callable[[], T]) -> T:
        if key in known:
            self._reach(self._held + known[key])
            return call()
        live = LiveBytes(self._device, self._limit - self._held)
        try:
            with live:
                out = call()
        finally:
            self._peak = max(self._peak, self._held + live.peak)
        known[key] = live.peak
        return out

    def _reach(self, count: int) -> None:
        if count > self._limit:
            raise OutOfMemoryError(f"{shown(count)} of tensors where {shown(self._limit)} are allowed")
        self._peak = max(self._peak, count)


class AllocatorMeter:
    """For CUDA, ROCm and Intel GPUs: what torch's caching allocator has reserved, capped by that allocator
    itself. Others in this process use it too: what they hold is left out.

    On Windows the driver (WDDM) moves what does not fit the card into the host's memory and says nothing;
    that is taken for out of memory too.
    """

    def __init__(self, device: torch.device) -> None:
        self._torch: Any = getattr(torch, device.type)
        self._device, self._held = device.type, 0
        self._limit: int | None = None
        gc.collect()  # what another library left in cycles would go later, and be missed among ours
        self._look()

    def limit(self, count: int | None) -> None:
        self._limit = count
        self._look()
        if self._held:
            self._cap()

    def reset(self) -> None:
        self._look()  # each stage is predicted from what is held, not from what the last one left
        self._torch.reset_peak_memory_stats()

    def bytes(self) -> int:
        return max(0, self._torch.max_memory_reserved() - self._others)

    def held(self) -> int:
        return max(0, self._torch.memory_reserved() - self._others)

    def hold(self, count: int) -> None:
        self._held += count

    def _look(self) -> None:
        """Give back what is cached; with nothing of ours loaded, read anew what others in this process hold,
        libraries' workspaces not among it, as these count as ours once a product has made them, and cap what
        all may have."""
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
            # what others took since they were looked at is not ours to give back
            most = max(self._limit + self._others, self._torch.memory_reserved() + self._limit - self._held)
            share = min(1.0, (max(0, most) + 1) / total)  # torch cuts the product off, so a byte more
        # Of Intel's GPUs from torch 2.9 on.
        if cap := getattr(self._torch, "set_per_process_memory_fraction", None):
            cap(share)

    def during(self, known: dict[Hashable, int], key: Hashable, call: Callable[[], T]) -> T:  # noqa: ARG002
        out = call()
        if sys.platform == "win32":
            (reserved, used, _), (now_reserved, now_used, free) = self._start, self._state()
            if gone := spilled(now_reserved - reserved, now_used - used, free):
                raise OutOfMemoryError(f"Windows moved {shown(gone)} of the card's memory into the host's")
        return out

    def _state(self) -> tuple[int, int, int]:
        free, total = self._torch.mem_get_info()
        return self._torch.memory_reserved(), total - free, free


# What others on the card may take or give meanwhile; a guess, no Windows machine was at hand.
SPILL_NOISE = 128 * 2**20


def spilled(reserved: int, used: int, free: int) -> int:
    """Bytes of ours that are not on the card, from how much we reserved and how much the card's use grew
    since the start, and what is free on it now: only a full card spills."""
    missing = reserved - used
    return missing if missing > SPILL_NOISE and free < SPILL_NOISE else 0


def meter(device: torch.device) -> Meter:
    return CountingMeter(device.type) if device.type in ("cpu", "mps") else AllocatorMeter(device)
