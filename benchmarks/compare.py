"""Results of `tightfit bench` beside each other: what got better or worse beyond noise, or what machines
differ in."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.units import shown

Row = Mapping[str, Any]
# What is noise at least: shares of seconds, of bytes as the allocator and as the process counts them;
# decibels.
_SECONDS, _BYTES, _PROCESS, _DECIBELS = 0.05, 0.01, 0.05, 0.5
# Processes of a plan, below which seconds are not judged: what one takes differs from what the next one does.
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
    """What a row measured, on whatever machine: model, size, steps and the plan."""
    request = row["request"]
    budget = "" if row["budget"] is None else f", within {shown(row['budget'])}"
    size = f"{request['width']}x{request['height']}, {request['steps']} steps"
    return (
        f"{Path(row['model']).name} {size}{budget}, "
        f"{row['summary'].replace(' on ' + row['plan']['device'], '')}"
    )


def identity(row: Row) -> str:
    """Two rows are of the same thing if this is the same, on whatever machine."""
    plan = row["plan"]
    placements = {part: {**how, "provider": ""} for part, how in plan["placements"].items()}
    return json.dumps(
        [Path(row["model"]).name, row["request"], row["budget"], plan["cfg"], placements], sort_keys=True
    )


def by_identity(rows: Iterable[Row]) -> dict[str, Row]:
    """The last row of each thing that was measured."""
    return {identity(row): row for row in rows}


def machine(rows: Iterable[Row]) -> str:
    """What the rows were measured on, in words."""
    return ", ".join(
        sorted({f"{row['hardware']['name']}, {row['hardware']['threads']} threads" for row in rows})
    )


def versions(before: Iterable[Row], after: Iterable[Row]) -> list[str]:
    """Packages that are not the same in both: 'torch 2.12.0 → 2.13.0'."""
    one, two = (
        {name: version for row in rows for name, version in row["versions"].items()}
        for rows in (before, after)
    )
    names = [name for name in {**one, **two} if one.get(name) != two.get(name)]
    return [f"{name} {one.get(name, '–')} → {two.get(name, '–')}" for name in names]


def changes(before: Row, after: Row) -> list[Change]:
    """What differs by more than noise. Of seconds, each process's median counts, as processes differ more
    than the pictures of one do: those of one file must all be slower than those of the other, by more than
    both spread."""
    own = name(after)
    if before["outcome"] != after["outcome"] and "ok" in (before["outcome"], after["outcome"]):
        return [Change(own, "outcome", before["outcome"], after["outcome"], after["outcome"] == "ok")]
    if after["outcome"] != "ok" or before["outcome"] != "ok":
        return []
    found = []
    a, b = before["runs"], after["runs"]
    if min(len(a), len(b)) >= FEW:
        one, two = statistics.median(a), statistics.median(b)
        noise = max(_SECONDS, 2 * spread(before) / one + 2 * spread(after) / two)
        if (max(a) < min(b) or max(b) < min(a)) and abs(two / one - 1) > noise:
            found.append(
                Change(own, "seconds", f"{one:.3g} s", f"{two:.3g} s ({two / one - 1:+.0%})", two < one)
            )
    for field, noise in (("peak_bytes", _BYTES), ("process_bytes", _PROCESS), ("disk_bytes", 0.0)):
        one, two = before[field], after[field]
        if abs(two - one) > noise * max(one, 1):
            found.append(Change(own, field.replace("_", " "), shown(one), shown(two), two < one))
    if before["quality"] and after["quality"]:
        one, two = before["quality"]["psnr"], after["quality"]["psnr"]
        if abs(two - one) > _DECIBELS:
            found.append(Change(own, "PSNR", f"{one:.1f} dB", f"{two:.1f} dB", two > one))
    return found


def seconds(row: Row) -> float:
    """Of a picture, the median."""
    return statistics.median(row["seconds"])


def spread(row: Row) -> float:
    """Half of what the processes' medians span, in seconds."""
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
    """A line for each thing that any of them measured: its name, and its figures in each file, seconds also
    as a multiple of the first file's that has it."""
    for key, text in {key: name(row) for rows in files for key, row in rows.items()}.items():
        there = [rows.get(key) for rows in files]
        base = next((seconds(row) for row in there if row and row["outcome"] == "ok"), None)
        cells = [figures(row) for row in there]
        for i, row in enumerate(there):
            if i and base and row and row["outcome"] == "ok":
                cells[i] += f", {seconds(row) / base:.2f}×"
        yield text, cells
