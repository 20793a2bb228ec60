"""What became of each picture that a table asks for: a SQLite file in the folder of the pictures. Whoever is
killed goes on where it was, paints nothing twice, and leaves no half picture."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection
from typing import Any

from ..database import UnkeptError, explained, opened
from ..files import replacing
from ..jobs import State
from .requests import Picture, options_of
from .table import RowError

FILE = "tightfit-batch.db"
ENDED = 3
"""How often a picture is begun whose process ends, besides its retries."""
_SCHEMA = """
create table if not exists groups (
    id integer primary key, options text not null, digest blob unique not null
);
create table if not exists pictures (
    number integer primary key, key blob unique not null, row integer not null, grp integer not null,
    options text not null, name text not null, twin blob, run integer not null, state text not null,
    tries integer not null default 0, file text, sha256 text, ended real, seconds real,
    predicted_seconds real, peak_bytes integer, plan text, error text, joules real
);
create index if not exists waiting on pictures (state, grp, options, number);
create table if not exists runs (id integer primary key, started real not null)
"""
_DONE, _FAILED, _WAITING, _RUNNING = (
    state.value for state in (State.DONE, State.FAILED, State.WAITING, State.RUNNING)
)


@dataclass(frozen=True)
class Item:
    """A picture to paint, as plain data that may be sent to another machine: its number in the ledger, its
    row in the table, the model, fields of Wishes, all options of its request, and a template for its name."""

    number: int
    row: int
    group: int
    model: str
    wishes: Mapping[str, Any]
    options: Mapping[str, Any]
    name: str


@dataclass(frozen=True)
class Measures:
    """What a picture took, of a run that may have painted several: its share of the seconds, those that were
    predicted, the peak of the run, the plan in a phrase, and its share of joules where these are measured."""

    seconds: float
    predicted_seconds: float
    peak_bytes: int
    plan: str
    joules: float | None = None


class Ledger:
    """The pictures of one folder. One process has it at a time; safe to use from threads that take turns.

    What cannot be read or written raises UnkeptError. Use as a context manager, or `close` it.
    """

    def __init__(self, folder: Path | None, keep: bool = True) -> None:
        """Without `keep` nothing is made or changed: a copy of what is known goes on, in a temporary file; an
        empty one without a folder."""
        file = folder / FILE if folder else None
        self.folder, self._keeps = folder or Path(), keep and folder is not None
        places = (file, folder, *folder.parents) if file and folder and keep else ()
        self._made = [place for place in places if not place.exists()]
        with self._explained():
            if folder and keep:
                folder.mkdir(parents=True, exist_ok=True)
            self._file = opened(file if keep else None, _SCHEMA)
            if file and not keep and file.exists():
                _copy(file, self._file)
            _complete(self._file)
        self._run = 0

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What was made for a table that is refused goes."""
        is_begun = kind is None or not self._made or self._is_begun()
        self._file.close()
        for place in () if is_begun else self._made:
            with suppress(OSError):
                place.rmdir() if place.is_dir() else place.unlink()

    def _is_begun(self) -> bool:
        """Whether a picture was painted, or tried."""
        try:
            begun = "select 1 from pictures where state != ? or tries > 0 limit 1"
            return bool(self._all(begun, _WAITING))
        except UnkeptError:
            return True

    # ------------------------------------------------------------------------------------ what is asked

    def ask(self, pictures: Iterable[Picture | RowError], most_errors: int = 20) -> list[RowError]:
        """Take in what a table asks; or nothing where rows are wrong, and answer what is wrong with the first
        of these. What is known already keeps its outcome."""
        errors: list[RowError] = []
        with self._explained():
            self._file.execute("begin")
            try:
                started = self._file.execute("insert into runs (started) values (?)", (time.time(),))
                run = started.lastrowid or 0
                self._file.executemany(
                    "insert into pictures (key, row, grp, options, name, twin, run, state) "
                    "values (?, ?, ?, ?, ?, ?, ?, ?) on conflict (key) do update set "
                    "run = excluded.run, row = excluded.row, "
                    "name = case state when excluded.state then excluded.name else name end",
                    self._rows(pictures, run, errors, most_errors),
                )
                self._run = run
                if errors:
                    self._file.rollback()
                else:
                    self._file.commit()
            except BaseException:
                self._file.rollback()
                raise
        return errors

    def _rows(
        self, pictures: Iterable[Picture | RowError], run: int, errors: list[RowError], most: int
    ) -> Iterator[tuple[Any, ...]]:
        groups: dict[str, int] = {}
        for picture in pictures:
            if isinstance(picture, RowError):
                errors.append(picture)
                if len(errors) == most:
                    return
            elif not errors:
                if (group := groups.get(picture.group)) is None:
                    if len(groups) > 10_000:
                        groups.clear()
                    group = groups[picture.group] = self._group(picture.group)
                options = json.dumps(picture.options, ensure_ascii=False)
                said = (picture.key, picture.row, group, options, picture.name, picture.twin, run, _WAITING)
                yield said

    def _group(self, options: str) -> int:
        digest = hashlib.blake2b(options.encode("utf-8", "replace"), digest_size=16).digest()
        self._file.execute(
            "insert into groups (options, digest) values (?, ?) on conflict (digest) do nothing",
            (options, digest),
        )
        return self._file.execute("select id from groups where digest = ?", (digest,)).fetchone()[0]

    # ------------------------------------------------------------------------------------ who is next

    def resume(self, retries: int = 0) -> int:
        """Go on after a run that ended somehow: what failed waits again, as does what is done and whose file
        is gone. Of those that were being painted, one whose file is whole is done, and one that has ended its
        process too often has failed; how many are begun again. Files that were half written go."""
        again = "update pictures set state = ?, tries = 0, error = null where state = ? and run = ?"
        begun_again = 0
        with self._explained(), self._file:
            self._file.execute(again, (_WAITING, _FAILED, self._run))
        done = self._all("select number, file from pictures where state = ? and run = ?", _DONE, self._run)
        for number, file in done:
            if not (self.folder / file).exists():
                self._change(number, state=_WAITING, tries=0, file=None)
        running = self._all("select number, file, sha256, tries from pictures where state = ?", _RUNNING)
        for number, file, sha256, tries in running:
            if file and _sha256(self.folder / file) == sha256:
                self._change(number, state=_DONE)
                continue
            said = f"the process ended while it was painted, {tries} times"
            has_failed = tries >= ENDED + retries
            self._change(number, state=_FAILED if has_failed else _WAITING, error=said)
            begun_again += not has_failed
        if running and self._keeps:
            for partial in self.folder.rglob(".tightfit-*.partial"):
                with suppress(OSError):
                    partial.unlink()
        return begun_again

    def groups(self) -> list[tuple[int, int]]:
        """What waits: groups, those that have most in common beside one another, and how many pictures each
        has."""
        return self._all(
            "select g.id, count(*) from pictures p join groups g on g.id = p.grp "
            "where p.state = ? and p.run = ? and p.twin is null group by g.id order by g.options",
            _WAITING,
            self._run,
        )

    def peek(self, group: int) -> Item:
        """The first of a group, to plan by."""
        return self._waiting(group, 1)[0]

    def take(self, group: int, count: int) -> list[Item]:
        """So many of a group, which are painted from now on; the same prompts come one after another. One
        that has failed, or ended its process, is alone, and after the others: it may do so again."""
        items = self._waiting(group, count)
        with self._explained(), self._file:
            self._file.executemany(
                "update pictures set state = ?, tries = tries + 1 where number = ?",
                [(_RUNNING, item.number) for item in items],
            )
        return items

    def give_back(self, items: Sequence[Item]) -> None:
        """They were not painted, for no reason of their own."""
        with self._explained(), self._file:
            self._file.executemany(
                "update pictures set state = ?, tries = tries - 1 where number = ? and state = ?",
                [(_WAITING, item.number, _RUNNING) for item in items],
            )

    def _waiting(self, group: int, count: int) -> list[Item]:
        query = (
            "select p.number, p.row, p.grp, g.options, p.options, p.name "
            "from pictures p join groups g on g.id = p.grp "
            "where p.state = ? and p.grp = ? and p.run = ? and p.twin is null and p.error is {} null "
            "order by p.options, p.number limit ?"
        )
        of_group = _WAITING, group, self._run
        rows = self._all(query.format(""), *of_group, count) or self._all(query.format("not"), *of_group, 1)
        return [_item(*row) for row in rows]

    # ------------------------------------------------------------------------------------ what became of it

    def write(self, item: Item, file: Path, content: bytes) -> None:
        """Keep the picture `content` as `file`: what will be there is said first, then it is written, whole
        or not at all. Raises NotADirectoryError where that is why it cannot be."""
        where, sha256 = file.relative_to(self.folder).as_posix(), hashlib.sha256(content).hexdigest()
        ((before, digest),) = self._all("select file, sha256 from pictures where number = ?", item.number)
        # Else it was interrupted after it was written.
        if not (before and digest == sha256 == _sha256(self.folder / before)):
            self._change(item.number, file=where, sha256=sha256)
            written(file, content)
        self._change(item.number, state=_DONE, ended=time.time(), error=None)

    def measured(self, items: Sequence[Item], measures: Measures) -> None:
        """What each of these took."""
        for item in items:
            self._change(item.number, **vars(measures))

    def failed(self, item: Item, error: str, retries: int = 0) -> bool:
        """It cannot be painted; whether it is tried again."""
        (tries,) = self._all("select tries from pictures where number = ?", item.number)[0]
        again = tries <= retries
        self._change(item.number, state=_WAITING if again else _FAILED, error=error, ended=time.time())
        return again

    def twins(self) -> Iterator[tuple[Item, Path | None]]:
        """Pictures that wait and are the same as others, with the file of these; None for one that failed."""
        rows = self._all(
            "select p.number, p.row, p.grp, g.options, p.options, p.name, o.file, o.state from pictures p "
            "join groups g on g.id = p.grp join pictures o on o.key = p.twin "
            "where p.state = ? and p.run = ? and o.state in (?, ?)",
            _WAITING,
            self._run,
            _DONE,
            _FAILED,
        )
        for *row, file, state in rows:
            yield _item(*row), self.folder / file if state == _DONE else None

    # ------------------------------------------------------------------------------------ what is known

    def counts(self) -> dict[str, int]:
        """Pictures of this run's table by their states."""
        rows = self._all("select state, count(*) from pictures where run = ? group by state", self._run)
        return dict(rows)

    def failures(self, most: int = 20) -> list[tuple[int, str]]:
        """Rows that failed, and why."""
        return self._all(
            "select row, error from pictures where run = ? and state = ? order by row limit ?",
            self._run,
            _FAILED,
            most,
        )

    def sums(self, since: float) -> dict[str, Any]:
        """Of the pictures of this run's table that were painted since then: their seconds, actual and
        predicted, the highest peak, and the energy, with the number of pictures of which it is known."""
        names = "seconds", "predicted_seconds", "peak_bytes", "joules", "joules_pictures"
        (sums,) = self._all(
            "select total(seconds), total(predicted_seconds), coalesce(max(peak_bytes), 0), "
            "sum(joules), count(joules) from pictures "
            "where run = ? and state = ? and ended >= ? and seconds is not null",
            self._run,
            _DONE,
            since,
        )
        return dict(zip(names, sums, strict=True))

    def slowest(self, since: float, most: int) -> list[dict[str, Any]]:
        """Of the same the slowest; of those that took equally long together, the first."""
        names = "row", "file", "seconds", "predicted_seconds", "plan", "together"
        rows = self._all(
            "select options, row, file, seconds, predicted_seconds, plan, count(*), min(number) "
            "from pictures where run = ? and state = ? and ended >= ? and seconds is not null "
            "group by grp, seconds order by seconds desc, min(number) limit ?",
            self._run,
            _DONE,
            since,
            most,
        )
        return [
            {**dict(zip(names, row, strict=True)), "seed": json.loads(options).get("seed")}
            for options, *row, _ in rows
        ]

    def rows(self, group: int, most: int) -> list[int]:
        """Rows of this run's table that ask for pictures of a group."""
        asking = "select distinct row from pictures where run = ? and grp = ? order by row limit ?"
        return [row for (row,) in self._all(asking, self._run, group, most)]

    def records(self, since: float = 0.0) -> Iterator[dict[str, Any]]:
        """All that is known of each picture of this run's table, of those that ended since then."""
        names = (
            "row",
            "state",
            "file",
            "sha256",
            "seconds",
            "predicted_seconds",
            "peak_bytes",
            "joules",
            "plan",
            "error",
        )
        with self._explained(), closing(self._file.cursor()) as cursor:
            cursor.execute(
                f"select {', '.join(f'p.{name}' for name in names)}, g.options, p.options from pictures p "
                "join groups g on g.id = p.grp where p.run = ? and coalesce(p.ended, 0) >= ? "
                "order by p.number",
                (self._run, since),
            )
            for *values, group, options in cursor:
                model, wishes, others = options_of(group)
                request = {"model": model, **wishes, **others, **json.loads(options)}
                yield {**dict(zip(names, values, strict=True)), "request": request}

    def _change(self, number: int, **values: Any) -> None:
        columns = ", ".join(f"{name} = ?" for name in values)
        with self._explained(), self._file:
            self._file.execute(f"update pictures set {columns} where number = ?", (*values.values(), number))

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._explained():
            return self._file.execute(query, values).fetchall()

    def _explained(self) -> AbstractContextManager[None]:
        another = "another tightfit batch paints into it: wait for that, or name another folder"
        return explained(f"{self.folder} cannot keep a ledger", another)


def _complete(database: Connection) -> None:
    """Columns that an earlier version did not have."""
    if "joules" not in {name for _, name, *_ in database.execute("pragma table_info(pictures)")}:
        database.execute("alter table pictures add column joules real")


def _copy(file: Path, database: Connection) -> None:
    """All that a ledger knows, into another."""
    with closing(opened(file, "")) as source:
        source.backup(database)


def _item(number: int, row: int, group: int, common: str, own: str, name: str) -> Item:
    model, wishes, options = options_of(common)
    return Item(number, row, group, model, wishes, {**options, **json.loads(own)}, name)


def written(file: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises UnkeptError, and NotADirectoryError where that is why."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial_file:
            partial_file.write_bytes(content)
    except (FileExistsError, NotADirectoryError):  # any other picture has room
        raise NotADirectoryError(f"{file} is behind a file that is no folder") from None
    except OSError as error:
        raise UnkeptError(f"{file} cannot be written ({error.strerror}): make room, then go on") from None


def _sha256(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""
