"""Whatever is placed in a ring lies apart from all else that is there, and what is needed stays."""

from __future__ import annotations

import random

import pytest
from tightfit.runtime.costs.footprint import Arrival, Footprint, Trace
from tightfit.runtime.costs.latency import streamed_seconds
from tightfit.runtime.ring import Ring, ahead


def test_places_never_overlap():
    """Against a plain table of bytes."""
    chance = random.Random(0)
    for _ in range(200):
        capacity = chance.randint(1, 40)
        ring, table, sizes = Ring[int](capacity), [-1] * capacity, {}
        for unit in range(60):
            count = chance.randint(1, capacity)
            needed = {other for other in sizes if other in ring and chance.random() < 0.3}
            before = {other for other in sizes if other in ring}
            gone = ring.put(unit, count, needed)
            if gone is None:
                assert {other for other in sizes if other in ring} == before
                continue
            assert not needed & set(gone)
            sizes[unit] = count
            start = ring.start(unit)
            table = [-1 if other in gone else other for other in table]
            assert set(table[start : start + count]) == {-1}
            table[start : start + count] = [unit] * count
            for other in sizes:
                if other in ring:
                    assert (
                        table[ring.start(other) : ring.start(other) + sizes[other]] == [other] * sizes[other]
                    )


def test_what_comes_next_stops_where_room_ends():
    sizes = {"a": 4, "b": 3, "c": 3, "d": 3}
    ring = Ring[str](10)
    ring.put("a", 4)
    assert list(ahead(ring, "a", "bcda", sizes)) == [("b", []), ("c", [])]  # d would lie on a, which computes
    assert list(ahead(ring, "b", "cda", sizes)) == [("d", ["a"])]  # from the start; a is past
    assert "a" not in ring


def footprint(sizes, ring):
    arrivals = tuple(Arrival(str(i), size, i, 0) for i, size in enumerate(sizes))
    return Footprint((), 0, Trace((), (), ()), (), arrivals=arrivals, ring=ring)


@pytest.mark.parametrize(
    ("sizes", "spans", "ring", "seconds"),
    [
        # Two slots of 10, one byte a second, by hand: each unit arrives while the one before computes.
        ((10, 10, 10), (10, 10, 10), 20, 30),
        # The bus is the slower.
        ((10, 10, 10), (1, 1, 1), 20, 30),
        # The computing is.
        ((10, 10, 10), (100, 100, 100), 20, 300),
        # Heavy to compute and light to copy, then the other way: with one unit ahead the bus would idle while
        # the first computes. The buffer holds both that follow.
        ((1, 10, 9), (30, 1, 1), 20, 32),
        # All of it fits: nothing is copied twice.
        ((5, 5, 5), (1, 1, 1), 20, 3),
    ],
)
def test_seconds_by_hand(sizes, spans, ring, seconds):
    assert streamed_seconds(footprint(sizes, ring), spans, 1.0) == pytest.approx(seconds)


def test_seconds_lie_between_what_cannot_be_beaten_and_one_after_another():
    """The larger of all copying and all computing, and their sum; with more room never slower by much."""
    chance = random.Random(1)
    for _ in range(200):
        sizes = [chance.randint(1, 20) for _ in range(chance.randint(2, 30))]
        spans = [chance.random() * 20 for _ in sizes]
        taken = streamed_seconds(footprint(sizes, 2 * max(sizes)), spans, 1.0)
        assert taken <= sum(sizes) + sum(spans) + 1e-6
        if sum(sizes) > 2 * max(sizes):
            assert taken >= sum(spans) - 1e-6
        assert streamed_seconds(footprint(sizes, sum(sizes)), spans, 1.0) == pytest.approx(sum(spans))
