"""Bytes that torch's caching allocator reserves for a sequence of allocations. Pure arithmetic: no device is
touched.

Sizes and rules are those of c10/cuda/CUDACachingAllocator.cpp (torch 2.8 to 2.13, default settings), which
ROCm and Intel's XPU share. Requests are rounded up to 512 bytes. Up to 1 MiB they are cut from segments of 2
MiB, below 10 MiB from segments of 20 MiB; a larger request gets a segment of its own, rounded up to 2 MiB.
The best-fitting free block is taken and split, free neighbours are merged again, and segments are returned
only when the cache is emptied.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Protocol

MIB = 2**20
_ROUND, _SMALL, _SMALL_SEGMENT, _LARGE, _LARGE_SEGMENT = 512, MIB, 2 * MIB, 10 * MIB, 20 * MIB


class Allocator(Protocol):
    """Replays allocations by name; `peak` is the most bytes reserved so far."""

    peak: int

    def allocate(self, name: int, count: int) -> None: ...

    def free(self, name: int) -> None: ...

    def moment(self, count: int) -> None:
        """Allocate and free at once."""
        ...


class ExactAllocator:
    """For the CPU and MPS: reserves exactly what is requested."""

    def __init__(self) -> None:
        self.peak = self._now = 0
        self._sizes: dict[int, int] = {}

    def allocate(self, name: int, count: int) -> None:
        self._sizes[name] = count
        self._now += count
        self.peak = max(self.peak, self._now)

    def free(self, name: int) -> None:
        self._now -= self._sizes.pop(name)

    def moment(self, count: int) -> None:
        self.peak = max(self.peak, self._now + count)


@dataclass(eq=False, slots=True)
class _Block:
    size: int
    small: bool
    order: int
    used: bool = True
    before: _Block | None = None
    after: _Block | None = None


class CachingAllocator:
    """torch's allocator for CUDA, with one stream."""

    def __init__(self) -> None:
        self.peak = self._reserved = self._count = 0
        self._blocks: dict[int, _Block] = {}
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}

    def allocate(self, name: int, count: int) -> None:
        if count == 0:
            return
        size = -(-count // _ROUND) * _ROUND
        small = size <= _SMALL
        block = self._best(size, small) or self._segment(size, small)
        spare = block.size - size
        if spare >= _ROUND if small else spare > _SMALL:
            remainder = self._block(spare, small)
            remainder.before, remainder.after = block, block.after
            if block.after:
                block.after.before = remainder
            block.after, block.size = remainder, size
            self._release(remainder)
        block.used = True
        self._blocks[name] = block

    def free(self, name: int) -> None:
        if block := self._blocks.pop(name, None):
            for neighbour in (block.before, block.after):
                if neighbour and not neighbour.used:
                    self._join(block, neighbour)
            self._release(block)

    def moment(self, count: int) -> None:
        size = -(-count // _ROUND) * _ROUND
        small = size <= _SMALL
        free = self._free[small]
        if count and bisect_left(free, (size, -1)) == len(free):  # else a block is split and merged again
            self._release(self._segment(size, small))

    def _best(self, size: int, small: bool) -> _Block | None:
        free = self._free[small]
        place = bisect_left(free, (size, -1))  # the smallest that fits
        return free.pop(place)[2] if place < len(free) else None

    def _segment(self, size: int, small: bool) -> _Block:
        large = _LARGE_SEGMENT if size < _LARGE else -(-size // (2 * MIB)) * 2 * MIB
        block = self._block(_SMALL_SEGMENT if small else large, small)
        self._reserved += block.size
        self.peak = max(self.peak, self._reserved)
        return block

    def _block(self, size: int, small: bool) -> _Block:
        self._count += 1
        return _Block(size, small, self._count)

    def _join(self, block: _Block, neighbour: _Block) -> None:
        """Merge `neighbour`, which is free, into `block`."""
        self._free[neighbour.small].remove((neighbour.size, neighbour.order, neighbour))
        block.size += neighbour.size
        if neighbour is block.before:
            block.before = neighbour.before
            if neighbour.before:
                neighbour.before.after = block
        else:
            block.after = neighbour.after
            if neighbour.after:
                neighbour.after.before = block

    def _release(self, block: _Block) -> None:
        block.used = False
        insort(self._free[block.small], (block.size, block.order, block))


def allocator(device: str) -> Allocator:
    """A new allocator of the kind that torch uses on `device`."""
    return CachingAllocator() if device in ("cuda", "xpu") else ExactAllocator()


class OnnxArena:
    """ONNX Runtime's arena (core/framework/bfc_arena.cc, default settings). It never shrinks.

    Requests are rounded up to 256 bytes and cut from regions; each region is twice the last, up to 1 GiB, or
    as large as the request. The best-fitting free chunk is taken, and split if half of it or 128 MiB would
    remain. `peak` counts each region up to its highest touched byte, since the system allocates pages when
    they are touched. `exact` is kSameAsRequested, as on a GPU: each region is as large as its request and
    counts in full.
    """

    def __init__(self, exact: bool = False) -> None:
        self._next, self._exact = MIB, exact
        self._free: list[tuple[int, int, int]] = []  # size, region, offset
        self._used: dict[int, tuple[int, int, int]] = {}
        self._touched: list[int] = []
        self.peak = 0

    def allocate(self, name: int, count: int) -> None:
        size = max(1, -(-count // 256)) * 256
        at = bisect_left(self._free, (size, 0, 0))
        if at == len(self._free):
            self._extend(size)
            at = bisect_left(self._free, (size, 0, 0))
        chunk_bytes, region, offset = self._free.pop(at)
        if chunk_bytes >= 2 * size or chunk_bytes - size >= 128 * MIB:
            insort(self._free, (chunk_bytes - size, region, offset + size))
            chunk_bytes = size
        self._used[name] = chunk_bytes, region, offset
        if not self._exact and offset + size > self._touched[region]:
            self.peak += offset + size - self._touched[region]
            self._touched[region] = offset + size

    def free(self, name: int) -> None:
        size, region, offset = self._used.pop(name)
        for neighbour in [
            chunk
            for chunk in self._free
            if chunk[1] == region and chunk[2] in (offset + size, offset - chunk[0])
        ]:
            self._free.remove(neighbour)
            size, offset = size + neighbour[0], min(offset, neighbour[2])
        insort(self._free, (size, region, offset))

    def moment(self, count: int) -> None:
        self.allocate(-(2**62), count)
        self.free(-(2**62))

    def _extend(self, size: int) -> None:
        if self._exact:
            insort(self._free, (size, len(self._touched), 0))
            self._touched.append(size)
            self.peak += size
            return
        grown = size > self._next
        while size > self._next:
            self._next *= 2
        insort(self._free, (self._next, len(self._touched), 0))
        self._touched.append(0)
        if not grown:
            self._next = min(2 * self._next, 1024 * MIB)
