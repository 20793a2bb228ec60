"""What is remembered goes with what it was of, and never grows without end."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

from tightfit.runtime.recent import Recent


class Owner:
    """Something that is known by its identity."""


def test_the_oldest_goes_and_what_is_asked_for_stays():
    kept, made = Recent(3), []
    compute = lambda key: lambda: made.append(key) or key * 10  # noqa: E731
    for key in (1, 2, 3, 1, 4, 1, 2):
        assert kept.get(key, compute(key)) == key * 10
    assert made == [1, 2, 3, 4, 2]
    assert len(kept) == 3


def test_a_value_that_is_nothing_is_remembered_too():
    kept, made = Recent(3), []
    for _ in range(3):
        assert kept.get("a", lambda: made.append(1)) is None
    assert made == [1]


def test_it_goes_with_its_owner():
    kept, first, second = Recent(10), Owner(), Owner()
    assert [kept.get("a", lambda n=n: n, owner) for n, owner in enumerate((first, second, first))] == [
        0,
        1,
        0,
    ]
    assert kept.get("a", lambda: 3, first, second) == 3
    assert len(kept) == 3
    del first
    gc.collect()
    assert len(kept) == 1
    assert kept.get("a", lambda: 9, second) == 1


def test_threads_that_ask_at_once_compute_once():
    kept, made, begun = Recent(4), [], threading.Barrier(4)

    def ask() -> object:
        begun.wait()
        return kept.get("a", lambda: made.append(1) or object())

    with ThreadPoolExecutor(4) as threads:
        answers = [asked.result() for asked in [threads.submit(ask) for _ in range(4)]]
    assert len(made) == 1
    assert len(set(map(id, answers))) == 1


def test_owners_that_die_in_other_threads():
    """More keys than there is room for, and owners that go while others are asked for: never another's
    value."""
    kept = Recent(3)

    def ask(number: int) -> bool:
        owner = Owner()
        asked = (
            kept.get(key, lambda key=key: (key, id(owner)), owner) == (key, id(owner)) for key in range(5)
        )
        return all([*asked, kept.get("shared", lambda: number) is not None])

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(400)))
    gc.collect()
    assert len(kept) <= 1


def test_a_computation_may_ask_for_another_value():
    kept = Recent(3)
    assert kept.get("a", lambda: kept.get("b", lambda: 1) + 1) == 2
    assert kept.get("b", lambda: 9) == 1
