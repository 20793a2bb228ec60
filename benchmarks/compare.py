"""Results of `tightfit bench` beside each other: what got better or worse beyond noise, or what machines differ in."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.memory import shown

Row = Mapping[str, Any]
# What is noise: a share of seconds (and then only if the slowest of one is faster than the fastest of the other) and of bytes as
# the allocator and the process count them, decibels.
_SECONDS, _BYTES, _PROCESS, _DECIBELS = 0.03, 0.01, 0.05, 0.5


@dataclass(frozen=True)
class Change:
    """One figure of one plan in two files; `better` or worse."""

    plan: str
    what: str
    before: str
    after: str
    better: bool


def name(row: Row) -> str:
    """What a row measured, on whatever machine: model, size, steps and the plan."""
    request = row["request"]
    size = f"{request['width']}x{request['height']}"
    return f"{Path(row['model']).name} {size}, {request['steps']} steps, {row['summary']}"


def identity(row: Row) -> str:
    """Two rows are of the same thing if this is the same."""
    request, plan = row["request"], row["plan"]
    what = [Path(row["model"]).name, request["width"], request["height"], request["steps"], plan["cfg"], plan["placements"]]
    return json.dumps([*what, plan["device"]], sort_keys=True)


def newest(rows: Iterable[Row]) -> dict[str, Row]:
    """The last row of each thing that was measured."""
    return {identity(row): row for row in rows}


def changes(before: Row, after: Row) -> list[Change]:
    """What differs by more than noise."""
    own = name(after)
    if before["outcome"] != after["outcome"]:
        return [Change(own, "outcome", before["outcome"], after["outcome"], after["outcome"] == "ok")]
    if after["outcome"] != "ok":
        return []
    found = []
    a, b = before["seconds"], after["seconds"]
    one, two = statistics.median(a), statistics.median(b)
    if (max(a) < min(b) or max(b) < min(a)) and abs(two / one - 1) > _SECONDS:
        found.append(Change(own, "seconds", f"{one:.2f} s", f"{two:.2f} s", two < one))
    for field, noise in (("peak_bytes", _BYTES), ("process_bytes", _PROCESS), ("disk_bytes", 0.0)):
        one, two = before[field], after[field]
        if abs(two - one) > noise * max(one, 1):
            found.append(Change(own, field.replace("_", " "), shown(one), shown(two), two < one))
    if before.get("quality") and after.get("quality"):
        one, two = before["quality"]["psnr"], after["quality"]["psnr"]
        if abs(two - one) > _DECIBELS:
            found.append(Change(own, "PSNR", f"{one:.1f} dB", f"{two:.1f} dB", two > one))
    return found


def figures(row: Row | None) -> str:
    """Seconds, peak and decibels in a few words."""
    if row is None:
        return "–"
    if row["outcome"] != "ok":
        return row["outcome"]
    decibels = f", {row['quality']['psnr']:.0f} dB" if row.get("quality") else ""
    return f"{statistics.median(row['seconds']):.2f} s, {shown(row['peak_bytes'])}{decibels}"


def merged(files: Sequence[Mapping[str, Row]]) -> list[tuple[str, list[str]]]:
    """A line for each thing that any of them measured: its name, and its figures in each file."""
    every = {key: name(row) for rows in files for key, row in rows.items()}
    return [(text, [figures(rows.get(key)) for rows in files]) for key, text in every.items()]
