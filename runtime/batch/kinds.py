"""Kinds of pictures that a table asks for, and how each card of a fleet would paint them; what a fleet is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import TightfitError
from ..files import shortened
from ..machine.hardware import Hardware
from ..machine.profiles import profile
from ..models.spec import ModelSpec
from ..placement import GRAPHS
from ..planner.choose import NoneFitsError
from ..planner.plan import Plan
from .fleet import Card, Kind, Way
from .ledger import Item, Ledger
from .painting import Here
from .report import hourly
from .running import MOST_CHECKED, wrong
from .spread import RUN_SECONDS
from .table import RowError

MOST_NODES = 10_000
_MOST_ROWS = 1000
_CARD = re.compile(r"\s*(?P<name>[\w.-]+)\s*(?::\s*(?P<count>\d{1,6})\s*)?(?:@(?P<price>.*))?")


def cards_of(text: str, price: float | None = None) -> list[Card]:
    """Of "rtx-3060-12gb:4@0.20/h,gtx-1650:10": profiles, how many nodes, dollars an hour of each; `price` is
    for those without one. Raises TightfitError."""
    cards = [_card(entry, price) for entry in text.split(",")]
    names = [card.name for card in cards]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise TightfitError(f"--profiles names {twice} twice: give it once, with a number")
    if (count := sum(card.count for card in cards)) > MOST_NODES:
        raise TightfitError(f"--profiles asks for {count} nodes, and {MOST_NODES} are the most: name fewer")
    return cards


def _card(entry: str, price: float | None) -> Card:
    if not (said := _CARD.fullmatch(entry)):
        raise TightfitError(
            f"--profiles is such as rtx-3060-12gb:4@0.20/h,gtx-1650:10, not {shortened(entry)}"
        )
    name, count = said["name"].lower(), int(said["count"] or 1)
    profile(name)  # raises here for one that there is not
    if not count:
        raise TightfitError(f"--profiles has no {name}: write {name}:1, or leave it out")
    return Card(name, count, hourly(said["price"], "--profiles") if said["price"] is not None else price)


def kinds_of(ledger: Ledger, painters: Mapping[str, Here]) -> tuple[list[Kind], list[RowError]]:
    """What a ledger's table asks for, planned on every card, and what is wrong with rows that run nowhere
    whatever the memory. Beyond the first kinds, others are taken to be as the mean of these."""
    kinds, errors, waiting = [], [], ledger.groups()
    most = max(1, MOST_CHECKED // len(painters))
    roomiest = sorted(painters.items(), key=lambda pair: (room_of(pair[1].models.hardware), pair[0]))
    for id_, pictures in waiting[:most]:
        item = ledger.peek(id_)
        try:
            kind = _kind(item, pictures, roomiest)
        except TightfitError as error:
            errors.append(wrong(item, pictures, error))
            continue
        kinds.append(kind if kind.ways else replace(kind, rows=tuple(ledger.rows(id_, _MOST_ROWS))))
    others = sum(pictures for _, pictures in waiting[most:])
    return ([*kinds, _mean(kinds, others)] if others and kinds else kinds), errors


def room_of(hardware: Hardware) -> tuple[bool, int]:
    """To sort by: the roomiest card first, then processors, whose bytes say nothing beside a card's."""
    return hardware.device == "cpu", -hardware.free_bytes


def _kind(item: Item, pictures: int, painters: Sequence[tuple[str, Here]]) -> Kind:
    ways: dict[str, Way] = {}
    refusals: dict[str, str] = {}
    model_bytes = 0
    for name, painter in painters:
        try:
            predicted = painter.predicted(item, pictures)
        except NoneFitsError as refusal:
            refusals[name] = str(refusal)
            continue
        plan = predicted.plan
        peak_bytes = plan.predicted.peak_bytes + plan.predicted.context_bytes
        few = max(1, int(RUN_SECONDS / max(predicted.seconds, 1e-9)))  # as slow nodes take towards the end
        ways[name] = Way(predicted.seconds, min(predicted.together, few), peak_bytes, plan.summary())
        model_bytes = max(model_bytes, _read_bytes(painter.models.spec(item.model), plan))
    return Kind((item.row,), pictures, item.model, model_bytes, painters[0][1].pixels(item), ways, refusals)


def _read_bytes(spec: ModelSpec, plan: Plan) -> int:
    """Of the files that a plan loads."""
    used = ((spec.components[name], way) for name, way in plan.placements.items() if name in spec.components)
    return sum(
        part.graph.stored_bytes if way.backend in GRAPHS and part.graph else part.stored_bytes
        for part, way in used
    )


def _mean(kinds: Sequence[Kind], pictures: int) -> Kind:
    """What stands for pictures that were not planned."""
    ways: dict[str, Way] = {}
    for name in {name: None for kind in kinds for name in kind.ways}:
        known = [(kind.pictures, kind.ways[name]) for kind in kinds if name in kind.ways]
        count = sum(number for number, _ in known)
        seconds = sum(number * way.seconds for number, way in known) / count
        most = max((way for _, way in known), key=lambda way: way.peak_bytes)
        together = min(way.together for _, way in known)
        ways[name] = Way(seconds, together, most.peak_bytes, "as the others, on the mean")
    pixels = math.ceil(
        sum(kind.pixels * kind.pictures for kind in kinds) / sum(kind.pictures for kind in kinds)
    )
    return Kind((), pictures, kinds[-1].model, kinds[-1].model_bytes, pixels, ways)
