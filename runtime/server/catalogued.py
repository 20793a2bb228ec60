"""What can be named: the models that are built in, and those in the folders of models, each with what it
would run as here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from ..asking import Shelves
from ..catalogue import Model, Planner, described, row
from ..kept import Hashes
from ..service import Service


class Catalogue:
    """What `tightfit models` lists, made once for what lies there. Safe to use from threads."""

    def __init__(self, service: Service) -> None:
        self._service, self._lock = service, threading.Lock()
        self._library: Any = self  # of which the rest is
        self._named: dict[str, Model] = {}
        self._rows: list[dict[str, Any]] = []

    def models(self) -> dict[str, Model]:
        """What is there, by the names that a client may give."""
        with self._lock:
            shelves = self._service.shelves or Shelves([])
            if self._library is not shelves.library:
                self._library, self._named = shelves.library, dict(_entries(shelves))
                self._rows = []
            return self._named

    def rows(self) -> list[dict[str, Any]]:
        """The rows of `tightfit models --json`. A model that is planned for the first time takes seconds."""
        named = self.models()
        with self._lock:
            if not self._rows:
                planner, hashes = Planner(self._service.hardware, self._service.wishes), Hashes()
                self._rows = [_row(name, planner.planned(model), hashes) for name, model in named.items()]
            return self._rows


def _entries(shelves: Shelves) -> Iterator[tuple[str, Model]]:
    for name, entry in [*shelves.named(), *((entry.name, entry) for entry in shelves.library.entries)]:
        yield name, described(entry)


def _row(name: str, model: Model, hashes: Hashes) -> dict[str, Any]:
    told = row(model, hashes) | {"name": name, "problem": model.brief or None, "fits": bool(model.plan)}
    del told["path"]  # the host's own affair
    return told | ({"plan": told["plan"] | {"model": name}} if model.plan else {})
