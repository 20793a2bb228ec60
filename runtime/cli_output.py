"""What the commands print alike: tables, bars, and files that are written whole or not at all."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from .errors import TightfitError
from .files import replacing

_PLAIN = 180  # columns of a table that goes to a file


def show_table(table: Any, lines: Sequence[tuple[str, str | None]], columns: int) -> None:
    """Print a rich table where there are so many columns, or where it is no terminal; else `lines`, each with its style."""
    from rich.console import Console

    console = Console(highlight=False)
    if console.is_terminal and console.width >= columns:
        console.print(table)
    elif console.is_terminal:
        for text, style in lines:
            console.print(text, markup=False, style=style)
    else:
        wide = Console(highlight=False, width=_PLAIN)
        with wide.capture() as captured:
            wide.print(table)
        typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def progress_bar(width: int) -> Any:
    """A rich bar on standard error, with a text of so many columns before it; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    text = TextColumn(f"{{task.description:<{width}}}")
    columns = (text, BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    console = Console(stderr=True, highlight=False)
    return Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty())


def write(file: Path, text: str) -> None:
    try:
        with replacing(file) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise TightfitError(f"{file} cannot be written ({error.strerror}): name another place") from None
