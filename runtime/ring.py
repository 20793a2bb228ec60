"""Where streamed weights lie on a device: a buffer smaller than all of them, filled in turn. Pure arithmetic,
shared by the Streamer and the prediction of its seconds."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Ring(Generic[K]):
    """Units in a buffer of `capacity` bytes, each contiguous. A new one goes behind the last, or wraps around
    to the start."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._places: dict[K, tuple[int, int]] = {}
        self._end = 0

    def __contains__(self, unit: K) -> bool:
        return unit in self._places

    def start(self, unit: K) -> int:
        """Offset of the unit. KeyError if it is not in the buffer."""
        return self._places[unit][0]

    def drop(self, unit: K) -> None:
        """Forget the unit."""
        del self._places[unit]

    def put(self, unit: K, count: int, needed: Container[K] = ()) -> list[K] | None:
        """Place `count` bytes and return the units evicted for them. None, with nothing changed, if a
        `needed` unit is in the way."""
        for start in (self._end, 0):
            end = start + count
            gone = [placed for placed, (low, high) in self._places.items() if low < end and start < high]
            if end <= self.capacity and not any(placed in needed for placed in gone):
                break
        else:
            return None
        for placed in gone:
            del self._places[placed]
        self._places[unit], self._end = (start, end), end
        return gone


def ahead(
    ring: Ring[K], now: K, upcoming: Iterable[K], sizes: Mapping[K, int]
) -> Iterator[tuple[K, list[K]]]:
    """Place the units that come after `now`, as long as each fits beside what is called before it. Yields
    each with the units evicted for it."""
    needed = {now}
    for unit in upcoming:
        needed.add(unit)
        if unit in ring:
            continue
        gone = ring.put(unit, sizes[unit], needed)
        if gone is None:
            return
        yield unit, gone
