"""What `tightfit cluster plan` does: reads the table, plans it on each card, and says who paints what."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from ..batch.fleet import Kind, Schedule, Share, Site, schedule
from ..batch.kinds import cards_of, kinds_of
from ..batch.ledger import Ledger
from ..batch.painting import Here
from ..batch.report import hourly
from ..batch.requests import Reading
from ..batch.table import rows
from ..errors import TightfitError, printable
from ..machine.profiles import profile
from ..open_models import OpenModels
from ..pipeline import MANY
from ..planner.wishes import Wishes
from ..units import parse_bytes, shown
from .batching import refuse
from .output import TEXT, say, say_json, show_table

if TYPE_CHECKING:
    from .cluster import Options

_MOST_SAID = 10  # kinds of pictures


def forecast(options: Options, defaults: Mapping[str, Any], budget: str | None) -> None:
    """Plan a table on every card, and print it. `defaults` are of every row, by their columns."""
    cards = cards_of(options.profiles, hourly(options.price) if options.price else None)
    site = _site(options)
    wished = Wishes(budget=budget, requests=MANY, images_per_call=options.images_per_call)
    reading = Reading(defaults, options.repeat, options.wildcards, options.models_dirs or ())
    with ExitStack() as stack:
        painters: dict[str, Here] = {}
        for card in cards:
            models = stack.enter_context(closing(OpenModels(profile(card.name), None, wished)))
            painters[card.name], reading.opened = Here(models, reading.models_dirs), models.spec
        # In a temporary file: rows need no memory.
        ledger = stack.enter_context(Ledger(None))
        refuse(ledger.ask(reading.pictures(rows(options.table, options.kind))))
        kinds, errors = kinds_of(ledger, painters)
    refuse(errors)
    planned = schedule(cards, kinds, site)
    notes = list(dict.fromkeys(painter.models.hardware.seconds_from for painter in painters.values()))
    if options.as_json:
        say_json({**planned.to_json(), "seconds_from": notes, "measured": False})
    elif planned.pictures:
        _show(planned, notes)
    nowhere = [kind for kind in kinds if not kind.ways]
    if not planned.pictures:
        _, reason = next(iter(nowhere[0].refusals.items()))
        raise TightfitError(f"no card of --profiles paints any of it: {reason}")
    if nowhere:
        raise typer.Exit(1)


def _site(options: Options) -> Site:
    given = {"storage_rate": options.storage, "network_rate": options.network}
    names = {"storage_rate": "--storage", "network_rate": "--network"}
    rates = {
        name: float(parse_bytes(text.removesuffix("/s"), names[name]))
        for name, text in given.items()
        if text is not None
    }
    return replace(Site(staged=options.stage_models), **rates)


def _show(planned: Schedule, notes: Sequence[str]) -> None:
    cards = ", ".join(f"{share.card.count} {share.card.name}" for share in planned.shares)
    _show_cards(f"{planned.pictures} pictures on {cards}", planned)
    dollars = "" if planned.cost is None else f", ${planned.cost:.2f}"
    pace = f"{planned.per_hour:.0f} pictures an hour"
    say(f"{planned.pictures} pictures, {long(planned.seconds)} predicted{dollars}, {pace}")
    parts = ", ".join(f"{name} {long(seconds)}" for name, seconds in planned.parts.items())
    say(f"• most goes to {planned.bound}: {parts}")
    for line in (*_unpriced(planned), *_limits(planned), *_left_out(planned)):
        say(f"• {line}")
    say(f"• seconds are estimates from {'; or '.join(notes)}; none was measured on these cards")
    for kind in planned.kinds:
        if not kind.ways:
            _, reason = next(iter(kind.refusals.items()))
            say(f"{_rows(kind)} nowhere ({kind.pictures} pictures): {reason}")


def _unpriced(planned: Schedule) -> Iterator[str]:
    """Why there are no dollars, where some cards have a price."""
    without = [share.card.name for share in planned.shares if share.card.price is None]
    if without and len(without) < len(planned.shares):
        yield f"no dollars, for lack of the price of {', '.join(without)}: such as :10@0.20/h, or --price"


def _show_cards(title: str, planned: Schedule) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("card", "nodes", "pictures", "share", "each", "busy", "peak"):
        table.add_column(column, justify="left" if column == "card" else "right", no_wrap=True)
    table.add_column("how it paints most of them", max_width=TEXT)
    lines: list[tuple[Sequence[str], str | None]] = []
    for share in planned.shares:
        cells = _cells(planned, share)
        table.add_row(*map(printable, cells))
        lines.append(
            ((f"{cells[1]} {cells[0]}: {cells[2]} pictures, {cells[4]}, {cells[6]}", cells[7]), None)
        )
    show_table(title, table, lines)


def _cells(planned: Schedule, share: Share) -> list[str]:
    count = sum(share.pictures)
    most = max(range(len(share.pictures)), key=share.pictures.__getitem__)
    way = planned.kinds[most].ways.get(share.card.name) if count else None
    busy = share.painting_seconds / (share.card.count * planned.seconds)
    return [
        share.card.name,
        str(share.card.count),
        str(count),
        f"{100 * count / planned.pictures:.0f} %",
        f"{share.painting_seconds / count:.3g} s" if count else "–",
        f"{100 * busy:.0f} %",
        shown(way.peak_bytes) if way else "–",
        way.plan if way else "it paints none",
    ]


def _limits(planned: Schedule) -> list[str]:
    """Where more nodes such as these help no more."""
    site, lines = planned.site, []
    if planned.model_bytes:
        source = "the driver" if site.staged else "shared storage"
        each, rate = shown(planned.model_bytes), f"{shown(site.source_rate)}/s"
        lines.append(
            f"{source}: each node reads {each} of weights, all at {rate} together; "
            f"beyond about {_count(planned.best_nodes(site.source_rate))} nodes it takes longer"
        )
        if not site.staged:
            best = _count(planned.best_nodes(site.network_rate))
            lines.append(f"with --stage-models, from one node at {shown(site.network_rate)}/s: {best} nodes")
    each = 1000 * planned.driver_seconds / planned.pictures
    lines.append(
        f"the driver takes and writes a picture in {each:.1f} ms: it keeps up with "
        f"{_count(planned.driver_nodes)} nodes"
    )
    return lines


def _count(nodes: float) -> str:
    return "any number of" if math.isinf(nodes) else f"{max(1.0, nodes):.0f}"


def _left_out(planned: Schedule) -> list[str]:
    """Cards that cannot paint what others do, or would only be waited for."""
    lines: list[str] = []
    for share in planned.shares:
        name = share.card.name
        kinds = [kind for kind in planned.kinds if kind.ways and name in kind.refusals]
        if kinds:
            count = sum(kind.pictures for kind in kinds)
            lines.append(f"{name} leaves {count} pictures to others: {kinds[0].refusals[name]}")
        elif not sum(share.pictures):
            lines.append(f"{name} paints none: others have made all before its first would be there")
    return lines


def _rows(kind: Kind) -> str:
    said = ", ".join(map(str, kind.rows[:_MOST_SAID]))
    more = ", …" if len(kind.rows) > _MOST_SAID else ""
    return f"rows {said}{more} fit" if len(kind.rows) > 1 else f"row {said} fits"


def long(seconds: float) -> str:
    """Seconds, minutes or hours, for people."""
    if seconds < 600:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
