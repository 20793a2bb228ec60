"""What torch's caching allocator reserves for a sequence of allocations. Pure arithmetic: no device is
touched.

Sizes and rules are those of c10/cuda/CUDACachingAllocator.cpp (torch 2.8 to 2.13, default settings), which
ROCm and Intel's XPU share: requests are rounded up to 512 bytes; up to 1 MiB they are cut from segments of 2
MiB, below 10 MiB from segments of 20 MiB, above that each segment is the request rounded up to 2 MiB. The
best fitting free block is taken and split, neighbours that are free are joined again, and segments are given
back only when the cache is emptied.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Protocol

MIB = 2**20
_ROUND, _SMALL, _SMALL_SEGMENT, _LARGE, _LARGE_SEGMENT = 512, MIB, 2 * MIB, 10 * MIB, 20 * MIB


class Allocator(Protocol):
    """Answers what is reserved while allocations come and go by their names; `peak` is the most so far."""

    peak: int

    def allocate(self, name: int, count: int) -> None: ...

    def free(self, name: int) -> None: ...

    def moment(self, count: int) -> None:
        """Allocate and free again at once."""
        ...


class ExactAllocator:
    """The CPU's and MPS's: what is asked for is what is taken."""

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
    """torch's for CUDA, with one stream."""

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
        left = block.size - size
        if left >= _ROUND if small else left > _SMALL:
            rest = self._block(left, small)
            rest.before, rest.after = block, block.after
            if block.after:
                block.after.before = rest
            block.after, block.size = rest, size
            self._release(rest)
        block.used = True
        self._blocks[name] = block

    def free(self, name: int) -> None:
        if block := self._blocks.pop(name, None):
            for other in (block.before, block.after):
                if other and not other.used:
                    self._join(block, other)
            self._release(block)

    def moment(self, count: int) -> None:
        size = -(-count // _ROUND) * _ROUND
        small = size <= _SMALL
        free = self._free[small]
        if count and bisect_left(free, (size, -1)) == len(free):  # else a block is split, and joined again
            self._release(self._segment(size, small))

    def _best(self, size: int, small: bool) -> _Block | None:
        free = self._free[small]
        place = bisect_left(free, (size, -1))  # the smallest that is large enough
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

    def _join(self, block: _Block, other: _Block) -> None:
        """`other`, a free neighbour, becomes part of `block`."""
        self._free[other.small].remove((other.size, other.order, other))
        block.size += other.size
        if other is block.before:
            block.before = other.before
            if other.before:
                other.before.after = block
        else:
            block.after = other.after
            if other.after:
                other.after.before = block

    def _release(self, block: _Block) -> None:
        block.used = False
        insort(self._free[block.small], (block.size, block.order, block))


def allocator(device: str) -> Allocator:
    """An empty one of the kind that torch uses on `device`."""
    return CachingAllocator() if device in ("cuda", "xpu") else ExactAllocator()


class OnnxArena:
    """ONNX Runtime's arena (core/framework/bfc_arena.cc, default settings): requests are rounded up to 256
    bytes and cut from regions, each twice the last up to 1 GiB, or large enough; the best fitting free chunk
    is taken, and split where half of it, or 128 MiB, would be left. Nothing is given back. `peak` is what has
    been touched of the regions, each from its beginning, as the system gives pages when they are touched.
    `exact` is kSameAsRequested on a GPU: regions as large as what is asked for, all of which counts.
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
        found, region, offset = self._free.pop(at)
        if found >= 2 * size or found - size >= 128 * MIB:
            insort(self._free, (found - size, region, offset + size))
            found = size
        self._used[name] = found, region, offset
        if not self._exact and offset + size > self._touched[region]:
            self.peak += offset + size - self._touched[region]
            self._touched[region] = offset + size

    def free(self, name: int) -> None:
        size, region, offset = self._used.pop(name)
        for other in [
            each for each in self._free if each[1] == region and each[2] in (offset + size, offset - each[0])
        ]:
            self._free.remove(other)
            size, offset = size + other[0], min(offset, other[2])
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
