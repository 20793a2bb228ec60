"""SQLite files that one process has at a time, and what their errors mean."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import TightfitError


class UnkeptError(TightfitError):
    """What should be kept cannot be written, or read, now: the disk is full, or the file is locked."""


def opened(file: Path | None, schema: str) -> sqlite3.Connection:
    """The database in `file`, or a temporary one, with what of `schema` is missing. Raises what sqlite3
    raises."""
    database = sqlite3.connect(file or "", timeout=5, check_same_thread=False)
    try:
        for setting in ("locking_mode = exclusive", "journal_mode = wal", "synchronous = normal"):
            database.execute(f"pragma {setting}")
        with database:
            for statement in filter(str.strip, schema.split(";")):
                database.execute(statement)
    except BaseException:
        database.close()
        raise
    return database


@contextmanager
def explained(problem: str, locked: str) -> Iterator[None]:
    """UnkeptError for what cannot be read or written: `problem`, and why. `locked` is the cure where another
    process has the file."""
    try:
        yield
    except sqlite3.OperationalError as error:
        cures = {"database is locked": locked, "database or disk is full": "the disk is full: make room"}
        raise UnkeptError(f"{problem}: {cures.get(str(error), str(error))}") from error
    except (sqlite3.Error, OSError) as error:
        raise UnkeptError(f"{problem}: {error}") from error
