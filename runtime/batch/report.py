"""What a batch took, and what it will: pictures an hour, dollars, predicted beside actual, the slowest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import TightfitError
from ..files import shortened
from ..jobs import State
from .ledger import Ledger
from .running import Group, Keeping
from .spread import Share, Spread

_SLOWEST = 3


def hourly(price: str, option: str = "--price") -> float:
    """Dollars an hour, of "0.35/h" or "0.35", typed for `option`. Raises TightfitError."""
    matched = re.fullmatch(r"\s*\$?(\d{1,6}(?:\.\d{1,6})?)\s*(?:/\s*h(?:our)?)?\s*", price)
    if not matched:
        raise TightfitError(f"{option} must be dollars an hour, such as 0.35/h, not {shortened(price)}")
    return float(matched[1])


@dataclass(frozen=True)
class Report:
    """One run. seconds: from its first picture to its end. sums: what its pictures took together. price:
    dollars an hour, of all machines together, or None. shares: of each machine, where there are several.
    begun_again: pictures whose process has ended."""

    counts: dict[str, int]
    painted: int
    seconds: float
    sums: Mapping[str, Any]
    slowest: Sequence[dict[str, Any]]
    failures: Sequence[tuple[int, str]]
    price: float | None
    shares: Mapping[str, Share] = field(default_factory=dict)
    begun_again: int = 0

    @property
    def hourly(self) -> float:
        """Pictures in an hour, at this run's pace."""
        return 3600 * self.painted / self.seconds if self.seconds else 0.0

    @property
    def cost(self) -> float | None:
        """Of this run, in dollars."""
        return None if self.price is None else self.price * self.seconds / 3600

    def to_json(self) -> dict[str, Any]:
        cost = self.cost
        each = cost / self.painted if cost is not None and self.painted else None
        nodes = [{"node": name, **asdict(share)} for name, share in self.shares.items()]
        return {
            "pictures": sum(self.counts.values()),
            **{state.value: self.counts.get(state.value, 0) for state in (State.DONE, State.FAILED)},
            "left": self.counts.get(State.WAITING.value, 0) + self.counts.get(State.RUNNING.value, 0),
            "painted": self.painted,
            "begun_again": self.begun_again,
            "seconds": self.seconds,
            "pictures_per_hour": self.hourly,
            "cost": cost,
            "cost_per_picture": each,
            "painting_seconds": self.sums["seconds"],
            "predicted_seconds": self.sums["predicted_seconds"],
            "peak_bytes": self.sums["peak_bytes"],
            "joules": self.sums["joules"],
            "joules_pictures": self.sums["joules_pictures"],
            "slowest": [*self.slowest],
            "failures": [{"row": row, "error": error} for row, error in self.failures],
        } | ({"nodes": nodes} if nodes else {})

    def lines(self) -> list[str]:
        """The same for people."""
        said = self.to_json()
        done = f"{said['done']} of {said['pictures']} pictures are there, {self.painted} of them new"
        if said["failed"]:
            done += f"; {said['failed']} failed"
        if self.begun_again:
            done += f"; {self.begun_again} were begun again, as the process that painted them ended"
        lines = [done]
        if self.painted and self.seconds:
            pace = f"{self.hourly:.0f} pictures an hour, {self.seconds / self.painted:.1f} s each"
            if said["cost"] is not None:
                pace += f", ${said['cost']:.2f}, ${said['cost_per_picture']:.4f} each"
            lines.append(pace)
        if said["painting_seconds"]:
            was = f"painting took {said['painting_seconds']:.1f} s, {said['predicted_seconds']:.1f} predicted"
            lines.append(f"{was}; slowest: {', '.join(map(_slow, said['slowest']))}")
        if count := said["joules_pictures"]:
            joules, part = said["joules"], "" if count == self.painted else f" of {count} of the pictures"
            lines.append(f"energy{part}: {joules / 3600:.3g} Wh, {joules / count:.3g} J each")
        lines += [_shared(name, share, self.painted) for name, share in self.shares.items()]
        lines += [f"row {row}: {error}" for row, error in self.failures]
        more = said["failed"] - len(self.failures)
        return lines + ([f"… and {more} more failed"] if more > 0 else [])


def _slow(one: Mapping[str, Any]) -> str:
    """Which picture it was, and how many took as long with it."""
    beside = f" and {one['together'] - 1} with it" if one["together"] > 1 else ""
    return f"{one['file']} (row {one['row']}{beside}) {one['seconds']:.1f} s"


def _shared(name: str, share: Share, painted: int) -> str:
    lost = f", lost {share.lost} times" if share.lost > 1 else ", lost" if share.lost else ""
    part = 100 * share.painted / max(1, painted)
    return f"{name} ({share.machine}): {share.painted} pictures, {part:.0f} %{lost}"


def reported(work: Keeping, since: float, seconds: float, price: float | None) -> Report:
    """Of a run that began at `since`, seconds since 1970."""
    ledger = work.ledger
    sums, slowest = ledger.sums(since), ledger.slowest(since, _SLOWEST)
    shares = work.shares if isinstance(work, Spread) else {}
    known = sums, slowest, ledger.failures()
    return Report(ledger.counts(), work.painted, seconds, *known, price, shares, work.begun_again)


def records(ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Each picture of the table, one after another: what became of it, and what was asked."""
    return ({**record, "seed": record["request"].get("seed")} for record in ledger.records())


def foreseen(groups: Sequence[Group], others: int, price: float | None) -> dict[str, Any]:
    """What would run: pictures of each kind by its plan, hours, dollars. `others` are pictures of kinds that
    were not planned, which are taken to be as these."""
    pictures, seconds = sum(group.count for group in groups), sum(group.seconds for group in groups)
    whole = seconds * (1 + others / pictures) if pictures else 0.0
    return {
        "pictures": pictures + others,
        "seconds": whole,
        "hours": whole / 3600,
        "cost": None if price is None else price * whole / 3600,
        "kinds": [
            {
                "model": group.first.model,
                "row": group.first.row,
                "pictures": group.count,
                "seconds": group.seconds,
                "peak_bytes": group.predicted.plan.predicted.peak_bytes,
                "plan": group.predicted.plan.summary(),
                "together": group.predicted.together,
                "request": dict(group.first.options),
            }
            for group in groups
        ],
        "unplanned": others,
    }
