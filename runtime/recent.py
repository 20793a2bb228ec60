"""Values computed from objects: the most recently used, kept while the objects live. Thread-safe."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Values by a key and their owners' identities. No owner is kept alive. An owner's values die with it, so
    a reused id never finds another object's value.

    A thread that asks while another computes waits and gets that result.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[Hashable, tuple[T, tuple[weakref.ref, ...]]] = {}
        self._turn = threading.RLock()  # a computation may ask for another value

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, compute: Callable[[], T], *owners: object) -> T:
        """The value of `key` and `owners`, computed if it is not cached."""
        full = (key, *(id(owner) for owner in owners))
        with self._turn:
            entry = self._kept.pop(full, None)
            if entry is None:
                entry = compute(), tuple(weakref.ref(owner, lambda _: self._forget(full)) for owner in owners)
            self._kept[full] = entry  # now the most recent
            for oldest in list(self._kept)[: max(0, len(self._kept) - self._most)]:
                self._forget(oldest)
        return entry[0]

    def clear(self) -> None:
        with self._turn:
            self._kept.clear()

    def _forget(self, full: Hashable) -> None:
        """Called in any thread at any moment, when an owner dies. It takes no lock: the thread that holds the
        lock may be waiting for this one. Popping an item is atomic, and so is the copy of the keys in
        `get`."""
        self._kept.pop(full, None)
