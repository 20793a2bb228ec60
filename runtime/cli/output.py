"""What the commands print alike: tables, bars, and files that are written whole or not at all."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import typer

from .. import interrupts
from ..errors import TightfitError, printable
from ..files import replacing

_FILE, _NARROW_FILE = 180, 100  # columns of a table that goes to a file, and of one for less room
_ENDLESS = 10_000
TEXT = 44
"""Columns of a text in a table, after which it may be broken where there is no more room."""


def say(text: object, err: bool = False) -> None:
    """Print one line, which may hold what others wrote, on standard output or standard error."""
    typer.echo(printable(text), err=err)


def say_json(value: Any, **lists: Iterable[Any]) -> None:
    """Print one JSON object, with `lists` that are written as they come, which may be long. Whatever is not
    ASCII is escaped, control characters among it."""
    whole = _json(value)
    typer.echo(whole[:-1] if lists else whole, nl=not lists)
    for name, items in lists.items():
        typer.echo(f', "{name}": [', nl=False)
        for index, item in enumerate(items):
            typer.echo(f"{',' if index else ''}\n {_json(item)}", nl=False)
        typer.echo("]", nl=False)
    if lists:
        typer.echo("}")


def _json(value: Any) -> str:
    return json.dumps(value).replace("\x7f", "\\u007f")


def show_table(title: str | None, table: Any, narrow: Any) -> None:
    """Print a rich table where a terminal has room for it, texts that wrap taken to be as wide as their
    column's max_width. Else print `narrow`: another table, which then goes to files, too, or
    lines: texts below one another, and their style.

    Both below the title. Cells of tables are `printable` text; that of the title and of lines is made so
    here.
    """
    from rich.console import Console
    from rich.measure import Measurement

    # A model may be called [bold] or :heart:
    plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    console = Console(**plain)
    needed = Measurement.get(console, console.options.update_width(_ENDLESS), table).maximum
    for column in table.columns:
        column.max_width = None  # they take what room there is
    has_lines = isinstance(narrow, Sequence)
    if not console.is_terminal:
        if title:
            say(title)
        file = Console(**plain, width=_FILE if has_lines else _NARROW_FILE)
        with file.capture() as captured:
            file.print(table if has_lines else narrow)
        typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))
        return
    if title:
        console.print(printable(title), style="bold", soft_wrap=True)
    if needed <= console.width or not has_lines:
        console.print(table if needed <= console.width else narrow)
        return
    for texts, style in narrow:
        console.print(*map(printable, texts), sep="\n  ", style=style)


def progress_bar(width: int, left: bool = False) -> Any:
    """A rich bar on standard error, with a text of so many columns before it, and with counts, or the time
    that is `left`; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    text = TextColumn(f"{{task.description:<{width}}}", markup=False)
    counts = TimeRemainingColumn() if left else TextColumn("{task.completed}/{task.total}")
    columns = (text, BarColumn(), counts, TimeElapsedColumn())
    console = Console(stderr=True, highlight=False)
    return Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty())


def write(file: Path, text: str) -> None:
    interrupts.tidily()
    try:
        with replacing(file) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise TightfitError(f"{file} cannot be written ({error.strerror}): name another place") from None
