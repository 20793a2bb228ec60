"""`tightfit grid`: one request along up to three axes, as labelled sheets and a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..machine.process import check_address_space
from ..planner.wishes import Wishes
from ..request import Request
from ..texts import TEXTS
from .batch import Options as BatchOptions
from .options import (
    ADAPTERS_IN_ORDER,
    ASKING_IN_ORDER,
    MODEL,
    NO_TEXT_CACHE,
    Adapting,
    Asking,
    Device,
    ModelsDirs,
    row_of,
    taking,
    wishes,
)
from .output import say, write

if TYPE_CHECKING:
    from ..batch.grid import Grid
    from ..batch.ledger import Ledger

_OUTPUT, _AXES = "Output", "Axes"
_Prompt = typer.Argument(help="What to paint.", show_default=False)
_X = typer.Option("--x", help="Of columns: steps=10,20,30.", metavar="AXIS", rich_help_panel=_AXES)
_Y = typer.Option("--y", help='Of rows: "scheduler=euler,Euler a".', metavar="AXIS", rich_help_panel=_AXES)
_Z = typer.Option("--z", help="Of sheets: seed=1..4.", metavar="AXIS", rich_help_panel=_AXES)
_Folder = typer.Option(
    "-o", "--output", help="Folder.", metavar="DIR", readable=False, rich_help_panel=_OUTPUT
)
_DryRun = typer.Option("--dry-run", help="Say what would run.", rich_help_panel=_OUTPUT)
_Price = typer.Option(help="Dollars an hour: 0.35/h.", metavar="X", rich_help_panel=_OUTPUT)
_Json = typer.Option("--json", help="Print one JSON object.", rich_help_panel=_OUTPUT)


@dataclass(frozen=True)
class Options:
    """Options of `grid` besides those of Request and Wishes."""

    prompt: Annotated[str, _Prompt]
    x: Annotated[str, _X]
    output: Annotated[Path, _Folder]
    y: Annotated[str | None, _Y] = None
    z: Annotated[str | None, _Z] = None
    model: Annotated[str | None, MODEL] = None
    models_dirs: ModelsDirs = None
    device: Device = "auto"
    no_text_cache: Annotated[bool, NO_TEXT_CACHE] = False
    dry_run: Annotated[bool, _DryRun] = False
    price: Annotated[str | None, _Price] = None
    as_json: Annotated[bool, _Json] = False


_ORDER = f"""
prompt x y z output
negative_prompt num_inference_steps guidance_scale width height seed scheduler
{ASKING_IN_ORDER}
model models_dirs {ADAPTERS_IN_ORDER}
precision compute backend provider device budget residency attention tiling prefer min_psnr ...
no_text_cache dry_run price as_json
"""


@taking(Options, Adapting, Asking, Request, Wishes, order=_ORDER)
def grid(
    options: Options,
    adapting: Mapping[str, Any],
    asking: Mapping[str, Any],
    asked: Mapping[str, Any],
    wished: Mapping[str, Any],
) -> None:
    """Paint one request along axes: columns of a batch, words of the prompt (prompt_sr=cat,dog), or ways to
    run (precision=fp32,int8,int4), with the PSNR of each cell."""
    TEXTS.keep(not options.no_text_cache)
    check_address_space()
    wishes(wished)  # raises here for what no plan knows
    from ..batch.grid import Grid
    from ..batch.requests import Reading
    from .batching import paint

    whole = Grid.read(options.x, options.y, options.z)
    row = {"seed": 0, **row_of(adapting, {**asked, **asking}, wished, options), "prompt": options.prompt}
    row.pop("num_images", None)
    batch = BatchOptions(
        table=Path("-"),
        output=options.output,
        device=options.device,
        dry_run=options.dry_run,
        price=options.price,
        as_json=options.as_json,
    ).checked()
    reading = Reading(models_dirs=options.models_dirs or ())
    shown = lambda ledger: show(whole, options, ledger)  # noqa: E731
    paint(batch, reading, whole.rows(row), wished.get("budget"), shown)


class _Cells(Mapping[Any, Any]):
    """Pictures by their places, opened when they are asked for: all of a large grid have no room."""

    def __init__(self, files: Mapping[Any, Path]) -> None:
        self._files = files

    def __getitem__(self, place: Any) -> Any:
        from PIL import Image

        with Image.open(self._files[place]) as image:
            return image.convert("RGB")

    def __iter__(self) -> Iterator[Any]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def show(grid: Grid, options: Options, ledger: Ledger) -> None:
    """Write the sheets, and the page."""
    from .. import pictures
    from ..batch import grid as grids

    files = {record["row"]: record["file"] for record in ledger.records() if record["state"] == "done"}
    places = {
        place: ledger.folder / files[number] for number, place in enumerate(grid.places, 1) if number in files
    }
    cells = _Cells(places)
    if not cells:
        return
    notes, count = grid.notes(cells), len(grid.axes[2].values)
    for k in range(count):
        name = f"grid-{k + 1}.png" if count > 1 else "grid.png"
        file = pictures.save(grids.sheet(grid, cells, notes, k), ledger.folder / name)
        say(file, err=options.as_json)
    title = grids.titled(options.prompt, [axis.name for axis in grid.axes if axis.name])
    write(ledger.folder / "grid.html", grids.page(title, grid, cells, notes))
    say(ledger.folder / "grid.html", err=options.as_json)
