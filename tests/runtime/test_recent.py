"""What is remembered goes with what it was of, and never grows without end."""

from __future__ import annotations

import gc

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
    assert [kept.get("a", lambda n=n: n, owner) for n, owner in enumerate((first, second, first))] == [0, 1, 0]
    assert kept.get("a", lambda: 3, first, second) == 3
    assert len(kept) == 3
    del first
    gc.collect()
    assert len(kept) == 1
    assert kept.get("a", lambda: 9, second) == 1
