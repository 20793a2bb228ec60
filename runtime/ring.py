"""Where weights that stream lie on a device: a buffer smaller than all of them, filled in turn. Pure
arithmetic, by which a Streamer works and its seconds are predicted."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Ring(Generic[K]):
    """Units in a buffer of `capacity` bytes, each in one piece: a new one comes behind the last, at the end
    at the start."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._places: dict[K, tuple[int, int]] = {}
        self._end = 0

    def __contains__(self, unit: K) -> bool:
        return unit in self._places

    def start(self, unit: K) -> int:
        """Where the unit begins. KeyError if it is not there."""
        return self._places[unit][0]

    def drop(self, unit: K) -> None:
        """Forget the unit."""
        del self._places[unit]

    def put(self, unit: K, count: int, needed: Container[K] = ()) -> list[K] | None:
        """Place `count` bytes, and answer the units that had to go for them. None, and nothing is changed, if
        one that is `needed` is in the way."""
        for start in (self._end, 0):
            end = start + count
            gone = [other for other, (low, high) in self._places.items() if low < end and start < high]
            if end <= self.capacity and not any(other in needed for other in gone):
                break
        else:
            return None
        for other in gone:
            del self._places[other]
        self._places[unit], self._end = (start, end), end
        return gone


def ahead(
    ring: Ring[K], now: K, upcoming: Iterable[K], sizes: Mapping[K, int]
) -> Iterator[tuple[K, list[K]]]:
    """Place what comes after `now`, as far as it fits beside what is called before it; each with the units
    that had to go."""
    needed = {now}
    for unit in upcoming:
        needed.add(unit)
        if unit in ring:
            continue
        gone = ring.put(unit, sizes[unit], needed)
        if gone is None:
            return
        yield unit, gone
