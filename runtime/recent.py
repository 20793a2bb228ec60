"""Values computed from objects, the most recently used, kept while the objects live. Safe to call from
threads."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Values by a key and the identity of their owners. No owner is kept alive. The values of an owner that
    dies go with it, so an id that is given out again never finds the value of another object.

    A thread that asks while another computes waits, and finds what that one computed.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[Hashable, tuple[T, tuple[weakref.ref, ...]]] = {}
        self._turn = threading.RLock()  # a computation may ask for another value

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, compute: Callable[[], T], *owners: object) -> T:
        """The value of `key` and `owners`, by `compute` if it is not there."""
        full = (key, *(id(owner) for owner in owners))
        with self._turn:
            entry = self._kept.pop(full, None)
            if entry is None:
                entry = compute(), tuple(weakref.ref(owner, lambda _: self._forget(full)) for owner in owners)
            self._kept[full] = entry  # the last now
            for oldest in list(self._kept)[: max(0, len(self._kept) - self._most)]:
                self._forget(oldest)
        return entry[0]

    def clear(self) -> None:
        with self._turn:
            self._kept.clear()

    def _forget(self, full: Hashable) -> None:
        """Called at any moment, in any thread, when an owner dies. It takes no lock, as the thread that holds
        the lock may be waiting for this one. Removing an item is one step, and so is copying the keys before
        they are read."""
        self._kept.pop(full, None)
