"""What `tightfit batch` does: reads the table, plans it, paints it with a bar, and reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .. import infotext, interrupts, lean, pictures
from ..adapters import ADAPTERS
from ..batch.ledger import Item, Ledger
from ..batch.painting import Encoded, Encoding, Failed, Here, Made, News, Stepped
from ..batch.report import foreseen, hourly, records, reported
from ..batch.requests import Reading
from ..batch.running import Batch, Group, planned
from ..batch.spread import Spread
from ..batch.table import Row, RowError, rows
from ..batch.uploading import Upload
from ..errors import TightfitError, printable
from ..jobs import State
from ..open_models import OpenModels
from ..pictures import METADATA
from ..pipeline import MANY
from ..planner.wishes import Wishes
from ..units import shown
from .naming import Template, values
from .options import machine_of
from .output import TEXT, progress_bar, say, say_json, show_table
from .saving import ENDINGS

if TYPE_CHECKING:
    from ..batch.nodes import RayCrew
    from .batch import Options


def run_batch(options: Options, defaults: Mapping[str, Any], budget: str | None) -> None:
    """Paint a table. `defaults` are of every row, by their columns."""
    reading = Reading(defaults, options.repeat, options.wildcards, options.models_dirs or ())
    table = rows(options.table, options.kind)
    if not options.upload or options.dry_run:
        return paint(options, reading, table, budget)
    with Upload(options.output, options.upload) as upload:

        def finish(ledger: Ledger) -> None:
            files = (one["file"] for one in ledger.records() if one["state"] == State.DONE)
            say(upload.finish(files), err=options.as_json)

        return paint(options, reading, table, budget, finish, upload.begin)


def paint(
    options: Options,
    reading: Reading,
    table: Iterator[Row],
    budget: str | None,
    finish: Callable[[Ledger], object] = lambda _: None,
    copy: Callable[[Path], object] = lambda _: None,
) -> None:
    """Take in a table, plan it, paint it, `copy` each picture, `finish`, and report."""
    price = hourly(options.price) if options.price else None
    here = None if options.ray else _here(options, reading, budget)
    reading.opened = here and here.models.spec
    interrupts.tidily()
    with Ledger(options.output, keep=not options.dry_run) as ledger, ExitStack() as ends:
        refuse(ledger.ask(_named(reading.pictures(table))))
        begun_again = ledger.resume(options.retries)
        how: Any = {"retries": options.retries, "fail_fast": options.fail_fast, "copy": copy}
        if here:
            ends.callback(here.models.close)
            planner, where = here, here.models.hardware.name
            work = Batch(ledger, Places(options), painter=here, **how)
        else:
            planner = ends.enter_context(_crew(options, reading, budget, ledger))
            where = f"{len(planner.ready())} nodes of {options.ray}"
            work = Spread(ledger, Places(options), crew=planner, **how)
        work.begun_again = begun_again
        groups, others, errors = planned(ledger, planner)
        refuse(errors)
        if options.dry_run:
            show_foreseen(foreseen(groups, others, price), options.as_json, where)
        else:
            watched(work, groups, others, price, options.as_json, finish)


def _here(options: Options, reading: Reading, budget: str | None) -> Here:
    machine = machine_of(options.device, None)
    wished = Wishes(budget=budget, requests=MANY, images_per_call=options.images_per_call)
    return Here(OpenModels(machine, None, wished), reading.models_dirs)


def _crew(options: Options, reading: Reading, budget: str | None, ledger: Ledger) -> RayCrew:
    """The nodes of a Ray cluster, with the models that they are sent."""
    from ..batch.nodes import RayCrew
    from ..batch.staging import parcel
    from ..batch.worker import Setup

    models = [ledger.peek(group).model for group, _ in ledger.groups()] if options.stage_models else []
    parcels = {model: parcel(model, reading.models_dirs) for model in dict.fromkeys(models)}
    sent = {model: parcel for model, parcel in parcels.items() if parcel}
    setup = Setup(
        encoding=Places(options).encoding,
        folder=str(Path.cwd()),
        models_dirs=tuple(str(place.absolute()) for place in reading.models_dirs),
        device=options.device,
        budget=budget,
        images_per_call=options.images_per_call,
        staged=tuple((model, parcel.digest) for model, parcel in sent.items()),
        keeps_texts=not options.no_text_cache,
    )
    return RayCrew(options.ray or "auto", setup, [*sent.values()], _say_note)


def _say_note(text: str) -> None:
    say(f"note: {text}", err=True)


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
    """End with a line for each row that is wrong, in the table's order."""
    *some, last = sorted(errors, key=lambda error: error.number) or [None]
    if last is None:
        return
    for error in some:
        say(f"tightfit: {error}", err=True)
    if len(errors) >= 20:
        say("tightfit: … these are the first that are wrong", err=True)
    raise last


class Places:
    """Where pictures go, by their names; never over a file that is there."""

    def __init__(self, options: Options) -> None:
        self._folder, self._moment = options.output, datetime.now()
        quality, metadata = options.quality or pictures.QUALITY, options.metadata or METADATA[0]
        self.encoding = Encoding(options.name, ENDINGS[options.format or "png"], quality, metadata)

    def encoded(self, made: Made) -> Encoded:
        return self.encoding.encoded(made)

    def __call__(self, encoded: Encoded) -> Path:
        template = Template(self.encoding.path(encoded.item))
        return self._free(template.filled(self._values(encoded) if template.names else {}))

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

    def _values(self, encoded: Encoded) -> dict[str, str]:
        given = [kind.option for kind in ADAPTERS]
        carried = infotext.parse(encoded.parameters, "the picture", given)
        return values(carried, f"{encoded.item.number:05d}", self._moment)


def watched(
    work: Batch | Spread,
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
            work.tell = watch = _Watch(bar, groups, others)
            if isinstance(work, Spread):
                work.crew.note = watch.note
            work.run()
        finish(work.ledger)
        failed = False
    finally:
        report = reported(work, since, time.perf_counter() - start, price)
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
                self.note(notice)
            step = f"step {news.event.step}/{news.event.steps}"
            self._bar.update(self._task, description=f"picture {self._done + 1}/{self._pictures}, {step}")
        elif isinstance(news, Encoded | Failed):
            self._done += 1
            self._bar.update(self._task, advance=self._each.get(news.item.group, self._usual))

    def note(self, text: str) -> None:
        self._bar.console.print(printable(f"note: {text}"), markup=False, emoji=False, soft_wrap=True)


def show_foreseen(said: Mapping[str, Any], as_json: bool, where: str) -> None:
    """What would run, as a table or as JSON."""
    if as_json:
        return say_json(said)
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("pictures", "model", "first row", "seconds", "peak"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    table.add_column("plan", max_width=TEXT)
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
    show_table(f"{said['pictures']} pictures on {where}", table, lines)
    if (more := len(said["kinds"]) - 50) > 0:
        say(f"… and {more} more kinds: --json lists them")
    if said["unplanned"]:
        say(f"{said['unplanned']} pictures of other kinds are taken to be as these")
    dollars = "" if said["cost"] is None else f", ${said['cost']:.2f}"
    say(f"{said['pictures']} pictures, {_long(said['seconds'])} predicted{dollars}")
    return None


def _long(seconds: float) -> str:
    return f"{seconds / 3600:.2f} hours" if seconds >= 600 else f"{seconds:.1f} s"
