"""What was computed of objects, kept while these live: so many of the last, the oldest given up first."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Values by a key and the identity of their owners. None keeps an owner alive, and those of one that is gone go with it, so
    that an id that is given out again finds nothing of another's."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[Hashable, tuple[T, tuple[weakref.ref, ...]]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, compute: Callable[[], T], *owners: object) -> T:
        """The value of `key` and `owners`, by `compute` if it is not there."""
        full = (key, *(id(owner) for owner in owners))
        found = self._kept.pop(full, None) or (compute(), tuple(weakref.ref(each, lambda _: self._forget(full)) for each in owners))
        self._kept[full] = found  # the last now
        while len(self._kept) > self._most:
            self._forget(list(self._kept)[0])  # noqa: RUF015  # in one step: an owner may go at any moment
        return found[0]

    def clear(self) -> None:
        self._kept.clear()

    def _forget(self, full: Hashable) -> None:
        self._kept.pop(full, None)
