"""Compares results of `tightfit bench`: what got better or worse beyond noise, or how machines differ."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.units import shown

Row = Mapping[str, Any]
# Smallest change that is not noise: shares of seconds, of the allocator's bytes and of the process's;
# decibels.
_SECONDS, _BYTES, _PROCESS, _DECIBELS = 0.05, 0.01, 0.05, 0.5
# Processes per plan below which seconds are not judged, because processes differ.
FEW = 3


@dataclass(frozen=True)
class Change:
    """One figure of one plan in two files; `better` or worse."""

    plan: str
    what: str
    before: str
    after: str
    better: bool


def name(row: Row) -> str:
    """What a row measured, on any machine: model, size, steps and plan."""
    request = row["request"]
    budget = "" if row["budget"] is None else f", within {shown(row['budget'])}"
    size = f"{request['width']}x{request['height']}, {request['steps']} steps"
    return (
        f"{Path(row['model']).name} {size}{budget}, "
        f"{row['summary'].replace(' on ' + row['plan']['device'], '')}"
    )


def identity(row: Row, step_cache: int | None = None) -> str:
    """Key of what a row measured, equal across machines; with another `step_cache`, of what that would be."""
    plan = row["plan"]
    placements = {part: {**as_before(how), "provider": ""} for part, how in plan["placements"].items()}
    facts = [Path(row["model"]).name, row["request"], row["budget"], plan["cfg"], placements]
    return json.dumps([*facts, step_cache or plan.get("step_cache", 1)], sort_keys=True)


def as_before(placement: Mapping[str, Any]) -> dict[str, Any]:
    """A placement without `packed` where nothing is: rows of before have no such field."""
    return {name: value for name, value in placement.items() if name != "packed" or value}


def by_identity(rows: Iterable[Row]) -> dict[str, Row]:
    """The last row for each thing that was measured."""
    return {identity(row): row for row in rows}


def machine(rows: Iterable[Row]) -> str:
    """The machine that the rows were measured on, in words."""
    return ", ".join(
        sorted({f"{row['hardware']['name']}, {row['hardware']['threads']} threads" for row in rows})
    )


def versions(before: Iterable[Row], after: Iterable[Row]) -> list[str]:
    """Packages that differ between the two: 'torch 2.12.0 → 2.13.0'."""
    old, new = (
        {name: version for row in rows for name, version in row["versions"].items()}
        for rows in (before, after)
    )
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name} {old.get(name, '–')} → {new.get(name, '–')}" for name in names]


def changes(before: Row, after: Row) -> list[Change]:
    """Differences beyond noise. For seconds, each process's median counts, because processes differ more than
    the pictures of one: all of one file's must be slower than all of the other's, by more than both
    spreads."""
    plan = name(after)
    if before["outcome"] != after["outcome"] and "ok" in (before["outcome"], after["outcome"]):
        return [Change(plan, "outcome", before["outcome"], after["outcome"], after["outcome"] == "ok")]
    if after["outcome"] != "ok" or before["outcome"] != "ok":
        return []
    changed = []
    a, b = before["runs"], after["runs"]
    if min(len(a), len(b)) >= FEW:
        old, new = statistics.median(a), statistics.median(b)
        noise = max(_SECONDS, 2 * spread(before) / old + 2 * spread(after) / new)
        if (max(a) < min(b) or max(b) < min(a)) and abs(new / old - 1) > noise:
            changed.append(
                Change(plan, "seconds", f"{old:.3g} s", f"{new:.3g} s ({new / old - 1:+.0%})", new < old)
            )
    for field, noise in (("peak_bytes", _BYTES), ("process_bytes", _PROCESS), ("disk_bytes", 0.0)):
        old, new = before[field], after[field]
        if abs(new - old) > noise * max(old, 1):
            changed.append(Change(plan, field.replace("_", " "), shown(old), shown(new), new < old))
    if before["quality"] and after["quality"]:
        old, new = before["quality"]["psnr"], after["quality"]["psnr"]
        if abs(new - old) > _DECIBELS:
            changed.append(Change(plan, "PSNR", f"{old:.1f} dB", f"{new:.1f} dB", new > old))
    return changed


def seconds(row: Row) -> float:
    """Median seconds per picture."""
    return statistics.median(row["seconds"])


def spread(row: Row) -> float:
    """Half the range of the processes' medians, in seconds."""
    return (max(row["runs"]) - min(row["runs"])) / 2


def figures(row: Row | None) -> str:
    """Seconds, peak and decibels in a few words."""
    if row is None:
        return "–"
    if row["outcome"] != "ok":
        return row["outcome"]
    decibels = (
        f", {row['quality']['psnr']:.0f} dB" if row["quality"] and row["key"] != row["reference"] else ""
    )
    return f"{seconds(row):.3g} s, {shown(row['peak_bytes'])}{decibels}"


def merged(files: Sequence[Mapping[str, Row]]) -> Iterator[tuple[str, list[str]]]:
    """For everything that any file measured: its name, and its figures in each file; seconds also relative to
    the first file that has it."""
    for key, text in {key: name(row) for rows in files for key, row in rows.items()}.items():
        results = [rows.get(key) for rows in files]
        base = next((seconds(row) for row in results if row and row["outcome"] == "ok"), None)
        cells = [figures(row) for row in results]
        for i, row in enumerate(results):
            if i and base and row and row["outcome"] == "ok":
                cells[i] += f", {seconds(row) / base:.2f}×"
        yield text, cells
