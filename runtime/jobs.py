"""Jobs of a queue, as data: what was asked, what became of it; and the file that keeps them."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any
from uuid import uuid4

from PIL import Image

from .errors import TightfitError
from .files import replacing

PICTURE = "$picture"
"""The key of a picture in options that are written as JSON: its file's name."""
_SCHEMA = """
create table if not exists jobs (
    number integer primary key autoincrement, id text unique not null, state text not null,
    asked text not null, created real not null, started real, ended real, tries integer not null,
    error text not null, summary text not null, pictures text not null
)
"""


class State(StrEnum):
    """Of a job. The last four are ends."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    STOPPED = "stopped"  # after the pictures that it has

    @property
    def is_end(self) -> bool:
        return self not in (State.WAITING, State.RUNNING)


@dataclass(frozen=True)
class Order:
    """What a client asks, as data.

    options: as `tightfit.runtime.asking` reads them; of `upscale`, image and scale; pictures are PIL images.
    wishes: fields of Wishes beside the service's own. does: paint or upscale; `model` is an upscaler then.
    client: who asks, for fairness. priority: what has more goes first. preview_every: steps from one preview
    to the next, 0 for none. note: JSON of the door that takes the order, given back as it is.
    """

    model: str
    options: Mapping[str, Any]
    wishes: Mapping[str, Any] = field(default_factory=dict)
    does: str = "paint"
    client: str = ""
    priority: int = 0
    preview_every: int = 0
    note: Mapping[str, Any] = field(default_factory=dict)

    def written(self, folder: Path) -> str:
        """As JSON, with its pictures as files in `folder`. Raises OSError."""
        count = 0

        def packed(value: Any) -> Any:
            nonlocal count
            if isinstance(value, Image.Image):
                folder.mkdir(parents=True, exist_ok=True)
                name, count = f"{count}.png", count + 1
                with replacing(folder / name) as partial:
                    value.save(partial, "PNG")
                return {PICTURE: name}
            if isinstance(value, list | tuple):
                return [packed(one) for one in value]
            return value

        options = {name: packed(value) for name, value in self.options.items()}
        return json.dumps(dataclasses.asdict(replace(self, options={})) | {"options": options})

    @classmethod
    def read(cls, text: str, folder: Path) -> Order:
        """What was written. Raises OSError for a picture that is gone."""

        def unpacked(value: Any) -> Any:
            if isinstance(value, dict) and PICTURE in value:
                with Image.open(folder / Path(value[PICTURE]).name, formats=["PNG"]) as image:
                    image.load()
                    return image
            return [unpacked(one) for one in value] if isinstance(value, list) else value

        fields = json.loads(text)
        options = {name: unpacked(value) for name, value in fields["options"].items()}
        return cls(**fields | {"options": options})


@dataclass(frozen=True)
class Record:
    """A job as it is now. Times are seconds since 1970. pictures: files. summary: what is known of the run,
    as JSON. tries: how often it was begun."""

    order: Order
    id: str = field(default_factory=lambda: uuid4().hex)
    state: State = State.WAITING
    created: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    tries: int = 0
    error: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)
    pictures: tuple[Path, ...] = ()


class Jobs:
    """The jobs of one queue in a folder: a SQLite file, and pictures as files. One process has it at a time.

    Safe to use from threads. What cannot be read or written raises a TightfitError that says why.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._lock = folder, threading.RLock()
        with self._explained():
            for place in (self.pictures, self._given):
                place.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = sqlite3.connect(folder / "jobs.db", timeout=5, check_same_thread=False)
            for setting in ("locking_mode = exclusive", "journal_mode = wal", "synchronous = normal"):
                self._file.execute(f"pragma {setting}")
            with self._file:
                self._file.execute(_SCHEMA)

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def _given(self) -> Path:
        return self.folder / "given"

    def add(self, record: Record) -> None:
        with self._explained(), self._lock, self._file:
            asked = record.order.written(self._given / record.id)
            self._file.execute(
                "insert into jobs (id, state, asked, created, tries, error, summary, pictures) "
                "values (?, ?, ?, ?, ?, '', '{}', '[]')",
                (record.id, record.state.value, asked, record.created, record.tries),
            )

    def change(self, record: Record) -> None:
        """Keep what has become of it."""
        names = [picture.name for picture in record.pictures]
        with self._explained(), self._lock, self._file:
            self._file.execute(
                "update jobs set state = ?, started = ?, ended = ?, tries = ?, error = ?, summary = ?, "
                "pictures = ? where id = ?",
                (
                    record.state.value,
                    record.started,
                    record.ended,
                    record.tries,
                    record.error,
                    json.dumps(record.summary),
                    json.dumps(names),
                    record.id,
                ),
            )
        if record.state.is_end:
            self._remove(self._given / record.id)

    def get(self, id: str) -> Record | None:  # noqa: A002
        return next(self._read("where id = ?", (id,)), None)

    def unfinished(self) -> list[Record]:
        """Those that wait, and those that ran when the process ended, in their order."""
        return [*self._read("where state in ('waiting', 'running') order by number")]

    def latest(self, count: int = 100, before: str = "") -> list[Record]:
        """The newest first, or those older than the job `before`."""
        older = "where number < (select number from jobs where id = ?)" if before else ""
        values = (before,) if before else ()
        return [*self._read(f"{older} order by number desc limit ?", (*values, count))]

    def forget(self, keep: int) -> None:
        """Remove all ended jobs but the newest `keep`, and their pictures."""
        ended = "state not in ('waiting', 'running')"
        old = [*self._read(f"where {ended} order by number desc limit -1 offset ?", (keep,))]
        for record in old:
            for picture in record.pictures:
                picture.unlink(missing_ok=True)
            with self._explained(), self._lock, self._file:
                self._file.execute("delete from jobs where id = ?", (record.id,))

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def _read(self, where: str, values: Sequence[Any] = ()) -> Iterator[Record]:
        columns = "id, state, asked, created, started, ended, tries, error, summary, pictures"
        with self._explained(), self._lock:
            rows = self._file.execute(f"select {columns} from jobs {where}", values).fetchall()
        for id_, state, asked, created, started, ended, tries, error, summary, pictures in rows:
            given = self._given / id_
            order = Order.read(asked, given) if not State(state).is_end else _without_pictures(asked)
            yield Record(
                order, id_, State(state), created, started, ended, tries, error, json.loads(summary),
                tuple(self.pictures / name for name in json.loads(pictures)),
            )  # fmt: skip

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            cure = {
                "database is locked": "another tightfit serves from it: stop that, or give --state another",
                "database or disk is full": "the disk is full: make room",
            }.get(str(error), str(error))
            raise TightfitError(f"{self.folder} cannot keep jobs: {cure}") from error
        except (sqlite3.Error, OSError) as error:
            raise TightfitError(f"{self.folder} cannot keep jobs: {error}") from error

    @staticmethod
    def _remove(folder: Path) -> None:
        with suppress(OSError):
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()


def _without_pictures(asked: str) -> Order:
    """Of a job that has ended: its pictures are gone, and stay as their names."""
    return Order(**json.loads(asked))
