"""Tables of requests, read as they come: JSON lines, CSV, or a prompt a line. Pure: no model is opened."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import TightfitError, first_line
from ..files import open_regular, shortened
from . import columns

KINDS = ("jsonl", "csv", "txt")
_ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".txt": "txt"}
_LINE_BYTES = 2**20
_TABLE_BYTES = 2**36
_SEPARATORS = (",", ";", "\t")


class RowError(TightfitError):
    """What is wrong in row `number`."""

    def __init__(self, number: int, said: object) -> None:
        super().__init__(f"row {number}: {said}")
        self.number, self.said = number, said


Row = tuple[int, Mapping[str, Any] | RowError]
"""Its number, from 1, as editors and spreadsheets count them; and its values by their columns, or what is
wrong with it."""


def rows(table: Path, kind: str | None = None) -> Iterator[Row]:
    """The rows of a file, or of standard input for "-". Raises TightfitError for what is no table at all."""
    known = kind or _ENDINGS.get(table.suffix.lower())
    if known is None and str(table) != "-":
        raise TightfitError(f"{table} ends in none of {', '.join(_ENDINGS)}: say --table {', '.join(KINDS)}")
    if known is not None and known not in KINDS:
        raise TightfitError(f"unknown --table {shortened(known)}: choose {', '.join(KINDS)}")
    with _opened(table) as stream:
        lines = _lines(stream)
        first = next(lines, None)
        if first is None:
            raise TightfitError(f"{table} is empty: give a request a line")
        if known is None:
            known = "jsonl" if _text(first).lstrip().startswith("{") else "txt"
        every = _with(first, lines)
        yield from {"jsonl": _json, "csv": _csv, "txt": _prompts}[known](every)


@contextmanager
def _opened(table: Path) -> Iterator[BinaryIO]:
    if str(table) == "-":
        yield sys.stdin.buffer
        return
    try:
        with open_regular(table, _TABLE_BYTES) as stream:
            yield stream
    except FileNotFoundError:
        raise TightfitError(f"{table} does not exist: name a table, or - for standard input") from None
    except OSError as error:
        raise TightfitError(f"{table} cannot be read: {error.strerror}") from None


Line = tuple[int, bytes]


def _lines(stream: BinaryIO) -> Iterator[Line]:
    number = 0
    while content := stream.readline(_LINE_BYTES + 1):
        number += 1
        if number == 1:
            if content.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise TightfitError("the table is in UTF-16: save it as UTF-8")
            content = content.removeprefix(b"\xef\xbb\xbf")  # Excel's byte order mark
        if len(content) > _LINE_BYTES:
            raise RowError(number, f"it has more than {_LINE_BYTES} bytes: break it up")
        yield number, content


def _with(first: Line, others: Iterator[Line]) -> Iterator[Line]:
    yield first
    yield from others


def _text(line: Line) -> str:
    try:
        return line[1].decode()
    except UnicodeDecodeError as error:
        raise RowError(line[0], f"byte {error.start + 1} is no UTF-8: save the table as UTF-8") from None


def _prompts(lines: Iterator[Line]) -> Iterator[Row]:
    for line in lines:
        try:
            text = _text(line).strip()
        except RowError as error:
            yield line[0], error
            continue
        if text:
            yield line[0], {"prompt": text}


def _json(lines: Iterator[Line]) -> Iterator[Row]:
    for line in lines:
        try:
            if text := _text(line).strip():
                yield line[0], columns.renamed(_object(line[0], text))
        except RowError as error:
            yield line[0], error
        except TightfitError as error:
            yield line[0], RowError(line[0], error)


def _object(number: int, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(number, f"it is no JSON ({first_line(error)}): write one object a line") from None
    if not isinstance(value, dict):
        raise RowError(number, f"{shortened(value)} is no object: write " + '{"prompt": "a red heart"}')
    return value


def _csv(lines: Iterator[Line]) -> Iterator[Row]:
    first = next(lines)
    head = _text(first)
    separator = _separator(head)
    read = csv.reader(map(_text, _with(first, lines)), delimiter=separator, strict=True)
    cells = next(read)
    header = _header(cells)
    typed = columns.typed(dict(zip(header, cells, strict=True)))
    number = 1
    while True:
        number += 1
        try:
            if (cells := next(read, None)) is None:
                return
            if any(cells):
                yield number, _cells(number, header, typed, cells)
        except csv.Error as error:
            cure = f"quote cells that have a {separator} or a quote"
            yield number, RowError(number, f"it is no CSV ({error}): {cure}")
            return  # where the next row begins is not known
        except RowError as error:
            yield number, RowError(number, error.said)


def _separator(head: str) -> str:
    """Of those that make columns which are known, the one that makes most."""

    def known(separator: str) -> int:
        names = next(csv.reader(io.StringIO(head), delimiter=separator), [])
        return sum(_is_column(name) for name in names)

    return max(_SEPARATORS, key=known)


def _is_column(name: str) -> bool:
    try:
        return bool(columns.column(name))
    except TightfitError:
        return False


def _header(cells: list[str]) -> list[str]:
    try:
        names = [columns.column(cell) for cell in cells]
    except TightfitError as error:
        one = " (the columns of a CSV are separated by commas, semicolons or tabs)" if len(cells) == 1 else ""
        raise RowError(1, f"{error}{one}") from None
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RowError(1, f"the column {twice} is there twice: leave one out")
    return names


def _cells(
    number: int, header: list[str], typed: Mapping[str, str], cells: list[str]
) -> columns.Named | RowError:
    if len(cells) != len(header):
        return RowError(
            number, f"it has {len(cells)} cells, and the header {len(header)}: quote cells that have a comma"
        )
    try:
        pairs = ((name, columns.read(name, cell)) for name, cell in zip(header, cells, strict=True))
        row = columns.Named({name: value for name, value in pairs if value is not None})
    except TightfitError as error:
        return RowError(number, columns.as_typed(error, typed))
    row.typed = typed
    return row
