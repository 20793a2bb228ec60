"""`tightfit models`: what is in folders of models, and what each would run as here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import interrupts
from ..errors import TightfitError, printable
from ..models.layouts.library import CONFIG, ENVIRONMENT, folders, scan
from ..planner.wishes import Wishes
from ..units import shown
from .options import HARDWARE, Device, ModelsDirs, machine_of, wishes
from .output import TEXT, progress_bar, say, say_json, show_table

if TYPE_CHECKING:
    from ..catalogue import Model, Planner
    from ..kept import Hashes

_DIGITS = 10  # of a hash, as A1111 shows it
_COLUMNS = ("name", "kind", "family", "size", "hash", "trigger words", "runs as")
_WRAPPED = ("trigger words", "runs as")
_Dirs = typer.Argument(help="Folders; default: those that are set up.", metavar="[DIR]…", show_default=False)
_Budget = typer.Option(
    "--vram", "--ram", help="Memory to fit in, e.g. 4GiB.", metavar="BYTES", rich_help_panel="Machine"
)
_Hash = typer.Option("--hash", help="Compute hashes (seconds per file).")
_Json = typer.Option("--json", help="Print one JSON object.")


def models(
    dirs: Annotated[list[Path] | None, _Dirs] = None,
    models_dirs: ModelsDirs = None,
    hardware: Annotated[str | None, HARDWARE] = None,
    device: Device = "auto",
    budget: Annotated[str | None, _Budget] = None,
    compute_hashes: Annotated[bool, _Hash] = False,
    as_json: Annotated[bool, _Json] = False,
) -> None:
    """List models: what each file is, and what it would run as here; no weight is read."""
    named = [*(dirs or ()), *(models_dirs or ())]
    roots = folders(named, alone=bool(dirs))
    if not roots:
        raise TightfitError(
            f"no folder of models is set up: name one, or set {ENVIRONMENT} or models in {CONFIG}"
        )
    machine = machine_of(device, hardware)
    wanted = Wishes(**wishes({"budget": budget} if budget else {}))
    from ..catalogue import Planner, row
    from ..kept import Hashes

    hashes, library = Hashes(), scan(roots)
    found = list(_catalogued(library.entries, Planner(machine, wanted), hashes if compute_hashes else None))
    if as_json:
        rows = [row(model, hashes) for model in found]
        say_json({"hardware": machine.name, "notes": [*machine.notes, *library.notes], "models": rows})
        return
    models = "model" if len(found) == 1 else "models"
    _print(f"{len(found)} {models} in {', '.join(map(str, roots))}, on {machine.name}", found, hashes)
    for note in library.notes:
        say(f"• {note}")
    unknown = sum(_is_hashed(model) and not hashes.get(model.entry.path) for model in found)
    if unknown:
        say(f"• {unknown} hashes are not known yet: --hash computes them, once per file")


def _catalogued(entries: Sequence[Any], planner: Planner, hashes: Hashes | None) -> Iterator[Model]:
    from ..catalogue import described

    interrupts.tidily()
    with progress_bar(40) as bar:
        task = bar.add_task("", total=len(entries))
        for entry in entries:
            bar.update(task, description=printable(entry.path.name)[:40])
            model = planner.planned(described(entry))
            if hashes and _is_hashed(model):
                with suppress(TightfitError):  # one that goes away while it is read has no hash
                    hashes.compute(entry.path)
            yield model
            bar.advance(task)


def _is_hashed(model: Model) -> bool:
    return model.entry.path.is_file() and not model.problem


def _print(title: str, found: Sequence[Model], hashes: Hashes) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in _COLUMNS:
        justify, wraps = "right" if column == "size" else "left", column in _WRAPPED
        table.add_column(column, justify=justify, no_wrap=not wraps, max_width=TEXT if wraps else None)
    lines: list[tuple[Sequence[str], str | None]] = []
    for model in found:
        cells = [printable(cell) for cell in _cells(model, hashes)]
        style = "dim" if model.problem else None
        table.add_row(*cells, style=style)
        name, *others = cells
        lines.append(((name, ", ".join(filter(None, others))), style))
    show_table(title, table, lines)


def _cells(model: Model, hashes: Hashes) -> list[str]:
    size = shown(model.stored_bytes) if model.stored_bytes else ""
    words, digits = ", ".join(model.triggers), hashes.get(model.entry.path)[:_DIGITS]
    return [model.entry.name, model.kind, model.family, size, digits, words, _runs_as(model)]


def _runs_as(model: Model) -> str:
    if not (plan := model.plan):
        return model.brief
    predicted = plan.predicted
    return f"{plan.precision} {plan.residency}, {predicted.seconds:.1f} s, {shown(predicted.peak_bytes)}"
