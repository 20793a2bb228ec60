"""What `tightfit batch` does: reads the table, plans it, paints it with a bar, and reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .. import infotext, interrupts, lean, pictures
from ..adapters import ADAPTERS
from ..batch.ledger import Item, Ledger
from ..batch.painting import Failed, Here, Made, News, Stepped
from ..batch.report import foreseen, hourly, records, reported
from ..batch.requests import Reading
from ..batch.running import Batch, Group, planned
from ..batch.table import Row, RowError, rows
from ..errors import TightfitError, printable
from ..machine.hardware import Hardware
from ..open_models import OpenModels
from ..pictures import METADATA
from ..pipeline import MANY
from ..planner.wishes import Wishes
from ..units import shown
from .naming import Template, values
from .options import machine_of
from .output import progress_bar, say, say_json, show_table
from .saving import ENDINGS

if TYPE_CHECKING:
    from PIL import Image

    from .batch import Options

_WIDE = 110


def run_batch(options: Options, defaults: Mapping[str, Any], budget: str | None) -> None:
    """Paint a table. `defaults` are of every row, by their columns."""
    reading = Reading(defaults, options.repeat, options.wildcards, options.models_dirs or ())
    paint(options, reading, rows(options.table, options.kind), budget)


def paint(
    options: Options,
    reading: Reading,
    table: Iterator[Row],
    budget: str | None,
    finish: Callable[[Ledger], object] = lambda _: None,
) -> None:
    """Take in a table, plan it, paint it, `finish`, and report."""
    price = hourly(options.price) if options.price else None
    machine = machine_of(options.device, None)
    interrupts.tidily()
    wished = Wishes(budget=budget, requests=MANY, images_per_call=options.images_per_call)
    models = OpenModels(machine, None, wished)
    painter = Here(models, reading.models_dirs)
    with Ledger(options.output, keep=not options.dry_run) as ledger, closing(models):
        refuse(ledger.ask(_named(reading.pictures(table))))
        ledger.resume(options.retries)
        groups, others, errors = planned(ledger, painter)
        refuse(errors)
        if options.dry_run:
            show_foreseen(foreseen(groups, others, price), options.as_json, machine)
            return
        places = Places(options)
        work = Batch(ledger, painter, places, retries=options.retries, fail_fast=options.fail_fast)
        watched(work, groups, others, price, options.as_json, finish)


def _named(pictures: Any) -> Any:
    """Those of the table; the template of a name that is wrong is wrong in its row."""
    known: set[str] = set()
    for picture in pictures:
        if isinstance(picture, RowError) or "[" not in picture.name or picture.name in known:
            yield picture
            continue
        try:
            Template(Path(picture.name))
            known.add(picture.name)
            yield picture
        except TightfitError as error:
            yield RowError(picture.row, error)


def refuse(errors: Sequence[RowError]) -> None:
    """End with a line for each row that is wrong."""
    *some, last = errors or [None]
    if last is None:
        return
    for error in some:
        say(f"tightfit: {error}", err=True)
    if len(errors) >= 20:
        say("tightfit: … these are the first that are wrong", err=True)
    raise TightfitError(str(last))


class Places:
    """Where pictures go, by their names; never over a file that is there."""

    def __init__(self, options: Options) -> None:
        self._folder, self._name = options.output, options.name
        self._ending = ENDINGS[options.format or "png"]
        self._quality, self._metadata = options.quality or pictures.QUALITY, options.metadata or METADATA[0]
        self._moment = datetime.now()

    def __call__(self, item: Item, image: Image.Image) -> tuple[Path, bytes]:
        path = Path(item.name or self._name)
        if path.suffix.lower() not in pictures.FORMATS:
            path = path.with_name(path.name + self._ending)
        template = Template(path)
        place = self._free(template.filled(self._values(item, image) if template.names else {}))
        return place, pictures.content(image, place.suffix.lower(), self._quality, self._metadata)

    def copied(self, item: Item, file: Path) -> Path:
        """By a name of its own without a field, else by that of the other with a number."""
        name = Path(item.name) if item.name and not Template(Path(item.name)).names else Path(file.name)
        return self._free(name.with_name(name.stem + file.suffix))

    def _free(self, name: Path) -> Path:
        place, number = self._folder / name, 1
        while place.exists():
            number += 1
            place = place.with_name(f"{name.stem}-{number}{name.suffix}")
        return place

    def _values(self, item: Item, image: Image.Image) -> dict[str, str]:
        given = [kind.option for kind in ADAPTERS]
        carried = infotext.parse(image.info[pictures.PARAMETERS], "the picture", given)
        return values(carried, f"{item.number:05d}", self._moment)


def watched(
    work: Batch,
    groups: Sequence[Group],
    others: int,
    price: float | None,
    as_json: bool,
    finish: Callable[[Ledger], object],
) -> None:
    """Run it with a bar, and report, whatever ends it."""
    since, start = time.time(), time.perf_counter()
    failed = True
    try:
        with progress_bar(30, left=True) as bar:
            work.tell = _Watch(bar, groups, others)
            work.run()
        finish(work.ledger)
        failed = False
    finally:
        report = reported(work.ledger, work.painted, since, time.perf_counter() - start, price)
        if as_json:
            say_json(report.to_json(), records=records(work.ledger))
        else:
            for line in report.lines():
                say(line, err=failed)
    if report.counts.get("failed"):
        raise typer.Exit(1)


class _Watch:
    """Tells a bar, in predicted seconds, so that what is left is too."""

    def __init__(self, bar: Any, groups: Sequence[Group], others: int) -> None:
        self._bar, self._each = bar, {group.id: group.predicted.seconds for group in groups}
        self._pictures = sum(group.count for group in groups) + others
        seconds = sum(group.seconds for group in groups)
        self._usual = seconds / max(1, self._pictures - others)
        self._task = bar.add_task("loading", total=seconds + others * self._usual)
        self._done = 0

    def __call__(self, news: News) -> None:
        if isinstance(news, Stepped):
            lean.settle()  # all is imported, or nearly
            for notice in news.event.notices:
                self._bar.console.print(
                    printable(f"note: {notice}"), markup=False, emoji=False, soft_wrap=True
                )
            step = f"step {news.event.step}/{news.event.steps}"
            self._bar.update(self._task, description=f"picture {self._done + 1}/{self._pictures}, {step}")
        elif isinstance(news, Made | Failed):
            self._done += 1
            self._bar.update(self._task, advance=self._each.get(news.item.group, self._usual))


def show_foreseen(said: Mapping[str, Any], as_json: bool, machine: Hardware) -> None:
    """What would run, as a table or as JSON."""
    if as_json:
        return say_json(said)
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("pictures", "model", "first row", "seconds", "peak"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    table.add_column("plan")
    lines: list[tuple[Sequence[str], str | None]] = []
    for kind in said["kinds"][:50]:
        peak = shown(kind["peak_bytes"])
        cells = [
            str(kind["pictures"]),
            kind["model"],
            str(kind["row"]),
            f"{kind['seconds']:.1f}",
            peak,
            kind["plan"],
        ]
        table.add_row(*map(printable, cells))
        lines.append(((f"{cells[0]} of {cells[1]}, {cells[3]} s, {cells[4]}", cells[5]), None))
    show_table(f"{said['pictures']} pictures on {machine.name}", table, lines, _WIDE)
    if (more := len(said["kinds"]) - 50) > 0:
        say(f"… and {more} more kinds: --json lists them")
    if said["unplanned"]:
        say(f"{said['unplanned']} pictures of other kinds are taken to be as these")
    dollars = "" if said["cost"] is None else f", ${said['cost']:.2f}"
    say(f"{said['pictures']} pictures, {_long(said['seconds'])} predicted{dollars}")
    return None


def _long(seconds: float) -> str:
    return f"{seconds / 3600:.2f} hours" if seconds >= 600 else f"{seconds:.1f} s"
