"""What gpu_check measured, on one screen: faults, worst first, then speeds in short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..runtime.units import shown

LINES, COLUMNS = 38, 140  # gpu_check prints two more lines
PREDICTED_WITHIN, AS_FAST = 0.05, 1.02
# Kinds of fault, the worst first, with their headings.
KINDS = {
    "picture": "wrong pictures and answers",
    "budget": "budgets not held, as the card says",
    "prediction": f"predictions off by more than {PREDICTED_WITHIN:.0%}",
    "failure": "failures",
    "slower": "slower than diffusers",
}
_SPEED_LINES = 18
Row = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """One of KINDS; `size` sorts faults of a kind, the largest first."""

    kind: str
    size: float
    text: str


def faults(sections: Mapping[str, Sequence[Row]]) -> list[Fault]:
    """Everything wrong in the sections' rows, worst first. A failure shared by several is reported once."""
    wrong, failures = list[Fault](), Counter[tuple[str, str]]()
    for section, rows in sections.items():
        wrong += _context(section, rows)
        for row in rows:
            wrong += _of(row)
            if why := row.get("failed"):
                failures[f"{section}, {name(row)}" if name(row) else section, str(why)] += 1
    same = Counter(why for (_, why), _ in failures.items())
    places = {why: where for (where, why) in reversed(failures)}  # the first place with it
    for why, count in same.items():
        more = f" and {count - 1} more" if count > 1 else ""
        wrong.append(Fault("failure", count, f"{places[why]}{more}: {why}"))
    order = list(KINDS)
    return sorted(wrong, key=lambda fault: (order.index(fault.kind), -fault.size))


def _context(section: str, rows: Sequence[Row]) -> Iterator[Fault]:
    """The context is the card's, not a plan's, so it is reported once per section."""
    off = [
        predicted / seen - 1
        for predicted, seen in (row["context"] for row in rows if "context" in row)
        if seen
    ]
    if off and abs(worst := max(off, key=abs)) > PREDICTED_WITHIN:
        yield Fault("prediction", abs(worst), f"{worst:+.1%} context: {section}")


def name(row: Row) -> str:
    """What ran."""
    keys = ("plan", "pipeline", "kernel", "picture", "test", "model", "what", "doubt")
    return str(next((row[key] for key in keys if key in row), ""))


def _of(row: Row) -> Iterator[Fault]:
    """Every fault of a row except failures."""
    if "decibels" in row and not row["decibels"] >= row["floor"]:
        off = row["floor"] - row["decibels"]
        yield Fault(
            "picture",
            off,
            f"{row['decibels']} dB, less than {row['floor']:g}, beside {row['beside']}: {name(row)}",
        )
    if row.get("wrong"):
        text = (
            f"{row['wrong']} of {row['cases']} wrong, "
            f"off by {row['worst']:g} where {row['bound']:g} may be: {name(row)}"
        )
        yield Fault("picture", 100 * row["wrong"] / row["cases"], text)
    if row.get("held") is False:
        over = row["used"] - row["cap"]
        yield Fault("budget", over, f"{shown(over)} above {row['cap'] / 1e9:g} GB: {name(row)}")
    stages = {
        stage: predicted / measured - 1
        for stage, (predicted, measured) in row.get("stages", {}).items()
        if measured
    }
    # in a first run, code that is loaded lazily is missing, so a stage may take less
    errors = {"in all": row.get("error", 0.0)} | {
        f"to {stage}": error for stage, error in stages.items() if error < 0
    }
    worst = max(errors, key=lambda where: abs(errors[where]))
    if abs(errors[worst]) > PREDICTED_WITHIN:
        yield Fault("prediction", abs(errors[worst]), f"{errors[worst]:+.1%} {worst}: {name(row)}")
    beside_theirs = str(row.get("of", "")).startswith("diffusers") and not name(row).startswith("diffusers")
    if beside_theirs and row["times"] > AS_FAST:
        yield Fault(
            "slower", row["times"], f"{row['times']:.2f} times the seconds of {row['of']}: {name(row)}"
        )


def screen(sections: Mapping[str, Sequence[Row]]) -> list[str]:
    """At most LINES lines of COLUMNS: as many faults of each kind as fit, then speeds, then what did not
    run."""
    wrong, speeds, missing = faults(sections), _speeds(sections), _missing(sections)
    counts = Counter(fault.kind for fault in wrong)
    lines = list[str]()
    room = LINES - min(len(speeds), _SPEED_LINES) - len(missing) - 2 * len(counts)
    for i, (kind, count) in enumerate(counts.items()):
        texts = [fault.text for fault in wrong if fault.kind == kind]
        most = max(1, min(count, room // (len(counts) - i)))
        room -= most
        lines.append(f"{KINDS[kind]}: {count}")
        lines += [f"  {text}" for text in texts[:most]] + (
            [f"  … {count - most} more"] if count > most else []
        )
    lines = lines or [f"nothing wrong in {sum(len(rows) for rows in sections.values())} rows"]
    return [_cut(line) for line in (*lines, *speeds[:_SPEED_LINES], *missing)]


def _cut(line: str) -> str:
    line = " ".join(line.split()) if not line.startswith("  ") else "  " + " ".join(line.split())
    return line if len(line) <= COLUMNS else line[: COLUMNS - 1] + "…"


def _speeds(sections: Mapping[str, Sequence[Row]]) -> list[str]:
    lines = []
    for section, rows in sections.items():
        timed = [row for row in rows if "times" in row]
        if timed:
            decibels = {name(row): f", {row['decibels']} dB" for row in rows if "decibels" in row}
            for row in timed:
                predicted = f", predicted {row['predicted s']} s" if "predicted s" in row else ""
                beside = (
                    f", {row['times']:.2f} times {row['of']}{decibels.get(name(row), '')}"
                    if name(row) != row["of"]
                    else ""
                )
                lines.append(f"{section}: {name(row)} {row['seconds']} s{predicted}{beside}")
        ran = [row for row in rows if "cap" in row and "measured" in row]
        if ran:
            errors, worst = [row["error"] for row in ran], min(row.get("decibels", 99.0) for row in ran)
            most = max(errors, key=abs)
            lines.append(
                f"{section}: {len(ran)} plans ran, worst prediction {most:+.1%}, worst picture {worst} dB"
            )
        kernels = [row for row in rows if "cases" in row]
        if kernels:
            lines.append(
                f"{section}: {sum(row['cases'] for row in kernels)} answers "
                f"of {len(kernels)} kernels compared"
            )
        unpacked = [f"{row['unpacked']} {row['GB/s']}" for row in rows if "unpacked" in row]
        lines += [f"{section}, unpacking GB/s: {', '.join(unpacked)}"] if unpacked else []
        copied = [row for row in rows if "copied MiB" in row]
        if copied:
            last = copied[-1]
            rates = (
                f"pinned {last['pinned GB/s']} GB/s, pageable {last['pageable GB/s']} GB/s, "
                f"pinning {last['pinning s']} s"
            )
            lines.append(f"{section}, {last['copied MiB']} MiB to the card: {rates}")
    return lines


def _missing(sections: Mapping[str, Sequence[Row]]) -> list[str]:
    unstarted = [
        row.get("what", section) for section, rows in sections.items() for row in rows if "left" in row
    ]
    skipped = [name(row) or section for section, rows in sections.items() for row in rows if "skipped" in row]
    lines = [f"no time for: {', '.join(unstarted)}"] if unstarted else []
    return lines + ([f"skipped: {', '.join(skipped)}"] if skipped else [])
