"""`tightfit upscale`: pictures, enlarged by an upscaler, each written beside what was asked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import interrupts
from ..errors import TightfitError, printable
from ..machine.hardware import Hardware
from ..machine.process import check_address_space
from ..pictures import FORMATS as ENDINGS
from ..pictures import METADATA
from ..planner.wishes import Wishes
from ..units import shown
from .options import Device, ModelsDirs, machine_of, taking, wishes
from .output import TEXT, progress_bar, say, say_json, show_table
from .saving import FORMATS, Saver, Writing, target

if TYPE_CHECKING:
    from ..planner.plan import Plan
    from ..upscale import Enlarged, Upscaler
    from .naming import Template

_OUTPUT = "Output"
_Pictures = typer.Argument(help="Pictures to enlarge.", metavar="PICTURE…", readable=False)
_Model = typer.Option(help="ESRGAN or Real-ESRGAN: file, or name.", metavar="MODEL", rich_help_panel="Model")
_Scale = typer.Option(help="How many times as large, 1 to 8; default the model's.", metavar="X")
_Out = typer.Option(
    "-o", "--output", help="File, or folder.", metavar="PATH", readable=False, rich_help_panel=_OUTPUT
)
_Overwrite = typer.Option("--overwrite", help="Replace, do not number.", rich_help_panel=_OUTPUT)
_Format = typer.Option(help=f"{', '.join(FORMATS)}.", metavar="NAME", rich_help_panel=_OUTPUT)
_Quality = typer.Option(help="Of JPEG and WebP, 1 to 100; default 90.", metavar="N", rich_help_panel=_OUTPUT)
_Metadata = typer.Option(help="Text inside: full, a1111, none.", metavar="NAME", rich_help_panel=_OUTPUT)
_Plans = typer.Option("--dry-run", help="Say what each way would take; enlarge nothing.")
_Hardware = typer.Option(help="A card that is not here: rtx-2060; with --dry-run.", metavar="NAME")
_Json = typer.Option("--json", help="Print one JSON object.", rich_help_panel=_OUTPUT)


@dataclass(frozen=True)
class Options:
    """Options of `upscale` besides those of Wishes."""

    given: Annotated[list[Path], _Pictures]
    model: Annotated[str, _Model]
    scale: Annotated[float | None, _Scale] = None
    models_dirs: ModelsDirs = None
    device: Device = "auto"
    output: Annotated[Path | None, _Out] = None
    overwrite: Annotated[bool, _Overwrite] = False
    format: Annotated[str | None, _Format] = None
    quality: Annotated[int | None, _Quality] = None
    metadata: Annotated[str | None, _Metadata] = None
    hardware: Annotated[str | None, _Hardware] = None
    dry_run: Annotated[bool, _Plans] = False
    as_json: Annotated[bool, _Json] = False

    @property
    def writing(self) -> Writing:
        return Writing(self.format, self.quality, self.metadata or METADATA[0], self.overwrite).checked()


_ORDER = """
given model scale models_dirs budget precision tiling min_psnr device
output overwrite format quality metadata dry_run hardware as_json
"""


@taking(Options, Wishes, order=_ORDER)
def upscale(options: Options, wished: Mapping[str, Any]) -> None:
    """Enlarge pictures by an upscaler, without seams, in as little memory as there is."""
    check_address_space()
    from ..upscale import Upscaler

    writing = options.writing
    fields = wishes(wished)
    machine = _machine(options)
    with Upscaler(
        options.model, models_dirs=options.models_dirs or (), hardware=machine, **fields
    ) as upscaler:
        if options.dry_run:
            _show_plans(upscaler, options)
            return
        places = [_place(options, file, upscaler) for file in options.given]
        rows = _enlarge(upscaler, options, [Saver(place, 1, writing) for place in places])
    if options.as_json:
        say_json({"model": str(upscaler.component.folder), "pictures": rows})


def _machine(options: Options) -> Hardware:
    if options.hardware and not options.dry_run:
        raise TightfitError("--hardware names a machine that is not here: give --dry-run with it")
    return machine_of(options.device, options.hardware)


def _place(options: Options, file: Path, upscaler: Upscaler) -> Template:
    output, form = options.output, options.writing.form
    if output is not None and output.suffix and not output.is_dir():
        if len(options.given) > 1 and output.suffix.lower() in ENDINGS:
            raise TightfitError(
                f"--output {output} is one picture, and {len(options.given)} are enlarged: name a folder"
            )
        if len(options.given) == 1:
            return target(output, "", 1, form)
    stem = re.sub(r"\[([^\[\]]*)\]", r"[[\1]]", file.stem)  # no fields in brackets
    ending = next(ending for ending, name in ENDINGS.items() if name == (form or "png").upper())
    return target((output or Path()) / f"{stem}-{upscaler.wanted(options.scale):g}x{ending}", "", 1, form)


def _enlarge(upscaler: Upscaler, options: Options, savers: Sequence[Saver]) -> list[dict[str, Any]]:
    """Each in its turn, saved as soon as it is there; one row of the report for each."""
    interrupts.tidily()
    rows = []
    with progress_bar(40) as bar:
        task = bar.add_task("", total=len(savers))
        for file, saver in zip(options.given, savers, strict=True):
            bar.update(task, description=printable(file.name)[:40])
            result = upscaler.enlarge(file, options.scale)
            for notice in result.notices:
                say(f"note: {notice}", err=True)
            saver(result.image, 0)
            bar.advance(task)
            rows.append(_row(file, saver, result))
            if not options.as_json:
                say(_line(saver, result))
    return rows


def _line(saver: Saver, result: Enlarged) -> str:
    from ..upscale import way

    measured, predicted = result.measured, result.plan.predicted
    width, height = result.image.size
    peak = f"peak {shown(measured.peak_bytes)} of {shown(predicted.peak_bytes)} predicted"
    process = f"process {shown(measured.process_bytes)}"
    how = f"{way(result.plan)} on {result.plan.device}"
    return f"{saver.paths[0]} · {width}x{height} · {how}, {measured.seconds:.1f} s · {peak}, {process}"


def _row(file: Path, saver: Saver, result: Enlarged) -> dict[str, Any]:
    return {
        "picture": str(file),
        "image": str(saver.paths[0]),
        "size": list(result.image.size),
        "plan": result.plan.to_json(),
        "measured": asdict(result.measured),
        "notices": list(result.notices),
    }


def _show_plans(upscaler: Upscaler, options: Options) -> None:
    """What each way of enlarging would take: a table for each picture."""
    from ..planner.upscaling import none_fits
    from ..upscale import open_picture

    rows, problem = [], None
    for file in options.given:
        picture = open_picture(file)
        plans = upscaler.plans(picture, options.scale)
        rows.append({"picture": str(file), "plans": [plan.to_json() for plan in plans]})
        if not options.as_json:
            size = f"{picture.width}x{picture.height}, {upscaler.wanted(options.scale):g} times"
            _print(f"{upscaler.name}, {file.name}, {size}, on {upscaler.hardware.name}", plans)
        if not plans[0].fits:
            problem = problem or none_fits(plans, upscaler.hardware, upscaler.sizes(picture, options.scale))
    if options.as_json:
        say_json({"model": str(upscaler.component.folder), "pictures": rows})
    if problem:
        raise problem


def _print(title: str, plans: Sequence[Plan]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("precision", "picture", "peak", "seconds", "dB"):
        table.add_column(
            column, justify="left" if column in ("precision", "picture") else "right", no_wrap=True
        )
    table.add_column("", max_width=TEXT)
    lines: list[tuple[Sequence[str], str | None]] = []
    for plan in plans:
        (placement,) = plan.placements.values()
        predicted, reason = plan.predicted, f"✓ {plan.reason}" if plan.chosen else plan.reason
        parts = "whole" if placement.tiling == "whole" else "in strips"
        figures = shown(predicted.peak_bytes), f"{predicted.seconds:.1f}", f"{predicted.psnr:.0f}"
        style = "bold" if plan.chosen else None if plan.fits else "dim"
        table.add_row(placement.precision, parts, *figures, printable(reason), style=style)
        lines.append(((f"{placement.precision} {parts}: {', '.join(figures)}", reason), style))
    show_table(title, table, lines)
    first = plans[0]
    holder = "the process itself" if first.device == "cpu" else "the device's context"
    say(f"• {shown(first.budget_bytes)} to fit in, {shown(first.predicted.context_bytes)} of it for {holder}")
