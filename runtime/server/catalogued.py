"""What can be named: the models that are built in, and those in the folders of models, each with what it
would run as here."""

from __future__ import annotations

import threading
from typing import Any

from ..asking import Shelves
from ..catalogue import Planner, described, row
from ..kept import Hashes
from ..models.layouts.library import Entry
from ..service import Service


class Catalogue:
    """The rows of `tightfit models --json`, made once for what lies there. Safe to use from threads."""

    def __init__(self, service: Service) -> None:
        self._service, self._lock = service, threading.Lock()
        self._library: Any = self  # of which the rows are
        self._rows: list[dict[str, Any]] = []

    def rows(self) -> list[dict[str, Any]]:
        """A model that is planned for the first time takes seconds."""
        with self._lock:
            shelves = self._service.shelves or Shelves([])
            if self._library is not shelves.library:
                self._library, self._rows = shelves.library, self._read(shelves)
            return self._rows

    def _read(self, shelves: Shelves) -> list[dict[str, Any]]:
        planner, hashes = Planner(self._service.hardware, self._service.wishes), Hashes()
        named = [*shelves.named(), *((entry.name, entry) for entry in shelves.library.entries)]
        return [self._row(name, entry, planner, hashes) for name, entry in named]

    def _row(self, name: str, entry: Entry, planner: Planner, hashes: Hashes) -> dict[str, Any]:
        model = planner.planned(described(entry))
        told = row(model, hashes) | {"name": name, "problem": model.brief or None, "fits": bool(model.plan)}
        del told["path"]  # the host's own affair
        return told | ({"plan": told["plan"] | {"model": name}} if model.plan else {})
