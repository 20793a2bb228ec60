"""Jobs of a queue, as data: what was asked, what became of it; and what keeps them, a file or memory."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any
from uuid import uuid4

from PIL import Image, ImageOps

from .database import UnkeptError as UnkeptError
from .database import explained, opened
from .errors import TightfitError
from .files import shortened
from .pictures import save

PICTURE = "$picture"
"""The key of a picture in options that are written as JSON: its file's name."""
_SCHEMA = """
create table if not exists jobs (
    number integer primary key autoincrement, id text unique not null, state text not null,
    asked text not null, created real not null, started real, ended real, tries integer not null,
    error text not null, summary text not null, pictures text not null
)
"""
_COLUMNS = "id, state, asked, created, started, ended, tries, error, summary, pictures"
_OPEN = "state in ('waiting', 'running')"
_ID = "[0-9a-f]{32}"
_PICTURE_FILE = re.compile(rf"{_ID}-\d+\.png")  # of a job; what else lies there is somebody's
_PARTIAL = ".tightfit-*.partial"
DOES = ("paint", "upscale")
_PRIORITIES = 2**31


class State(StrEnum):
    """Of a job. The last five are ends."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    STOPPED = "stopped"  # after the pictures that it has
    POSTPONED = "postponed"  # until the next start: an end in this process, while it waits in its folder

    @property
    def is_end(self) -> bool:
        return self not in (State.WAITING, State.RUNNING)


@dataclass(frozen=True)
class Order:
    """What a client asks, as data.

    options: as `tightfit.runtime.asking` reads them; of `upscale`, image and scale; pictures are PIL images.
    wishes: fields of Wishes beside the service's own. does: paint or upscale; `model` is an upscaler then.
    client: who asks, for fairness. priority: of one client's jobs what has more goes first. preview_every:
    steps from one preview to the next, 0 for none. note: JSON of the door that takes the order, given back
    as it is.
    """

    model: str
    options: Mapping[str, Any]
    wishes: Mapping[str, Any] = field(default_factory=dict)
    does: str = "paint"
    client: str = ""
    priority: int = 0
    preview_every: int = 0
    note: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise TightfitError for a field that is of another kind."""
        for name in ("model", "client"):
            if not isinstance(value := getattr(self, name), str):
                raise TightfitError(f"{name} must be text, not {shortened(value)}")
        for name in ("options", "wishes", "note"):
            if not isinstance(value := getattr(self, name), Mapping) or not all(map(_is_text, value)):
                raise TightfitError(f"{name} must be values by their names, not {shortened(value)}")
        if self.does not in DOES:
            raise TightfitError(f"unknown kind of job {shortened(self.does)}: choose {', '.join(DOES)}")
        for name, least in (("priority", -_PRIORITIES), ("preview_every", 0)):
            if type(value := getattr(self, name)) is not int or not least <= value <= _PRIORITIES:
                said = f"a whole number from {least} to {_PRIORITIES}"
                raise TightfitError(f"{name} must be {said}, not {shortened(value)}")

    @property
    def bare(self) -> Order:
        """Without its pictures, and whatever else is not JSON."""
        options = {name: _packed(value, lambda _: {PICTURE: ""}) for name, value in self.options.items()}
        return replace(self, options=options)

    @property
    def pixels(self) -> int:
        """Of all its pictures."""
        sizes: list[tuple[int, int]] = []
        for value in self.options.values():
            _packed(value, lambda one: sizes.append(one.size) if isinstance(one, Image.Image) else None)
        return sum(width * height for width, height in sizes)

    @property
    def characters(self) -> int:
        """Of all its texts, as JSON."""
        try:
            return len(json.dumps(dataclasses.asdict(self.bare), ensure_ascii=False, default=str))
        except (TypeError, ValueError, RecursionError) as error:
            raise TightfitError(f"the order is no JSON ({error}): give texts, numbers and lists") from None

    def written(self, folder: Path) -> str:
        """As JSON, with its pictures as files in `folder`. Raises OSError, and TightfitError for what is no
        JSON."""
        count = 0

        def kept(value: Any) -> Any:
            nonlocal count
            if not isinstance(value, Image.Image):
                raise TightfitError(f"{shortened(value)} is neither text, a number nor a picture: give one")
            folder.mkdir(parents=True, exist_ok=True)
            name, count = f"{count}.png", count + 1
            try:
                save(ImageOps.exif_transpose(value), folder / name)  # no EXIF is written
            except TightfitError as error:
                raise UnkeptError(str(error)) from error
            return {PICTURE: name}

        try:
            options = {name: _packed(value, kept) for name, value in self.options.items()}
            fields = dataclasses.asdict(replace(self, options={})) | {"options": options}
            return json.dumps(fields, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise TightfitError(f"the order is no JSON ({error}): give texts, numbers and lists") from None

    @classmethod
    def read(cls, text: str, folder: Path) -> Order:
        """What was written. Raises OSError for a picture that is gone, ValueError or TypeError for what no
        version of ours wrote."""

        def unpacked(value: Any) -> Any:
            if isinstance(value, dict) and PICTURE in value:
                with Image.open(folder / Path(value[PICTURE]).name, formats=["PNG"]) as image:
                    image.load()
                    return image
            return [unpacked(one) for one in value] if isinstance(value, list) else value

        fields = json.loads(text)
        options = {name: unpacked(value) for name, value in fields["options"].items()}
        return cls(**fields | {"options": options})


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _packed(value: Any, other: Callable[[Any], Any]) -> Any:
    """`value` as JSON, whatever is none as `other` has it."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_packed(one, other) for one in value]
    if isinstance(value, dict):
        return {str(name): _packed(one, other) for name, one in value.items()}
    return other(value)


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


class Remembered:
    """The jobs of one queue in memory, without pictures. Safe to use from threads."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}
        self._lock = threading.Lock()

    def add(self, record: Record) -> None:
        self.change(record)

    def change(self, record: Record) -> None:
        with self._lock:
            known = self._records.get(record.id)
            self._records[record.id] = replace(record, order=known.order if known else record.order.bare)

    def get(self, id: str) -> Record | None:  # noqa: A002
        return self._records.get(id)

    def unfinished(self) -> Iterator[tuple[Record, str]]:
        return iter(())

    def latest(self, count: int = 100, before: str = "") -> list[Record]:
        with self._lock:
            names = [*self._records]
            end = names.index(before) if before in names else 0 if before else len(names)
            return [self._records[name] for name in names[max(0, end - count) : end][::-1]]

    def forget(self, keep: int) -> None:
        with self._lock:
            ended = [name for name, record in self._records.items() if record.state.is_end]
            for name in ended[: max(0, len(ended) - keep)]:
                del self._records[name]

    def close(self) -> None:
        """Nothing stays open."""


class Jobs:
    """The jobs of one queue in a folder: a SQLite file, and pictures as files. One process has it at a time.

    Safe to use from threads. What cannot be read or written raises an UnkeptError that says why.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._lock = folder, threading.RLock()
        with self._explained():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for place in (self.pictures, self._given):
                place.mkdir(exist_ok=True, mode=0o700)
            self._file = opened(folder / "jobs.db", _SCHEMA)
        try:
            with self._explained():
                self._sweep()
        except BaseException:
            self._file.close()
            raise

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def _given(self) -> Path:
        return self.folder / "given"

    def add(self, record: Record) -> None:
        """Keep a new one, its pictures first. Raises TightfitError for what no JSON has."""
        given = self._given / record.id
        try:
            with self._explained():
                asked = record.order.written(given)
                with self._lock, self._file:
                    self._file.execute(
                        "insert into jobs (id, state, asked, created, tries, error, summary, pictures) "
                        "values (?, ?, ?, ?, ?, '', '{}', '[]')",
                        (record.id, record.state.value, asked, record.created, record.tries),
                    )
        except BaseException:
            self._remove(given)
            raise

    def change(self, record: Record) -> None:
        """Keep what has become of it."""
        values = (
            record.state.value,
            record.started,
            record.ended,
            record.tries,
            _text(record.error),
            json.dumps(record.summary, default=str),
            json.dumps([picture.name for picture in record.pictures]),
            record.id,
        )
        with self._explained(), self._lock, self._file:
            self._file.execute(
                "update jobs set state = ?, started = ?, ended = ?, tries = ?, error = ?, summary = ?, "
                "pictures = ? where id = ?",
                values,
            )
        if record.state.is_end:
            self._remove(self._given / record.id)

    def get(self, id: str) -> Record | None:  # noqa: A002
        return next(iter(self._read("where id = ?", (_text(id),))), None)

    def unfinished(self) -> Iterator[tuple[Record, str]]:
        """Those that wait, and those that ran when the process ended, in their order, with their pictures;
        and of each what is in the way of that, '' where nothing is."""
        return map(self.complete, self._read(f"where {_OPEN} order by number"))

    def latest(self, count: int = 100, before: str = "") -> list[Record]:
        """The newest first, or those older than the job `before`."""
        older = "where number < (select number from jobs where id = ?)" if before else ""
        values = (_text(before),) if before else ()
        return self._read(f"{older} order by number desc limit ?", (*values, count))

    def forget(self, keep: int) -> None:
        """Remove all ended jobs but the newest `keep`, and their pictures."""
        for record in self._read(f"where not {_OPEN} order by number desc limit -1 offset ?", (keep,)):
            for picture in record.pictures:
                _unlink(picture)
            with self._explained(), self._lock, self._file:
                self._file.execute("delete from jobs where id = ?", (record.id,))

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def _read(self, where: str, values: Sequence[Any] = ()) -> list[Record]:
        """Without the pictures that they were given."""
        with self._explained(), self._lock:
            rows = self._file.execute(f"select {_COLUMNS} from jobs {where}", values).fetchall()
        return [
            Record(
                _order(asked), id_, State(state), created, started, ended, tries, error, json.loads(summary),
                tuple(self.pictures / name for name in json.loads(pictures)),
            )
            for id_, state, asked, created, started, ended, tries, error, summary, pictures in rows
        ]  # fmt: skip

    def complete(self, record: Record) -> tuple[Record, str]:
        """With the pictures that it was given, and what is in the way of that."""
        try:
            with self._explained(), self._lock:
                rows = self._file.execute("select asked from jobs where id = ?", (record.id,)).fetchall()
            return replace(record, order=Order.read(rows[0][0], self._given / record.id)), ""
        # Whatever Pillow raises for a damaged file; of one job, which is no reason to lose the others.
        except Exception as error:
            return record, f"what it was given cannot be read again ({error}): ask once more"

    def _sweep(self) -> None:
        """Remove what a process has left that was killed between writing files and saying so."""
        rows = self._file.execute(f"select id, pictures, {_OPEN} from jobs").fetchall()
        known = {name for _, names, _ in rows for name in json.loads(names)}
        waiting = {id_ for id_, _, is_open in rows if is_open}
        for file in [*self.pictures.glob("*.png"), *self.pictures.glob(_PARTIAL)]:
            if file.name not in known and (_PICTURE_FILE.fullmatch(file.name) or file.suffix == ".partial"):
                _unlink(file)
        for folder in self._given.iterdir():
            if re.fullmatch(_ID, folder.name) and folder.name not in waiting:
                self._remove(folder)

    def _explained(self) -> AbstractContextManager[None]:
        another = "another tightfit serves from it: stop that, or give --state another"
        return explained(f"{self.folder} cannot keep jobs", another)

    @staticmethod
    def _remove(folder: Path) -> None:
        with suppress(OSError):
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()


def _text(value: str) -> str:
    """As SQLite takes it: a name of a file may be no text."""
    return value.encode("utf-8", "replace").decode()


def _unlink(file: Path) -> None:
    with suppress(OSError):
        file.unlink()


def _order(asked: str) -> Order:
    """Its pictures stay as their names. One that no version of ours wrote is empty."""
    try:
        return Order(**json.loads(asked))
    except (TypeError, ValueError):
        return Order("", {})
