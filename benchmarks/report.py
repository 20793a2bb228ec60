"""One page that needs nothing else: what each plan took and gave, as plots, a table and pictures."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from ..runtime.memory import shown
from ..runtime.plan import STAGES
from .metrics import MOST_PSNR, difference
from .plots import Axis, Point, axis, bars, scatter

Row = dict[str, Any]
_SIDE = 256  # pixels of a picture on the page
_GAIN = 8
_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1c1c1e, #e8e8ea); --pale: light-dark(#6b6b70, #a0a0a6);
  --line: light-dark(#e2e2e6, #3a3a3e); --ground: light-dark(#fff, #18181a); }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 1180px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.6em; margin-bottom: 0; } h2 { font-size: 1.2em; margin: 2em 0 .2em; }
p { color: var(--pale); margin: .2em 0 1em; }
code { font-size: .9em; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 1.5em; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
svg text { font-size: 12px; fill: var(--pale); } svg .name { fill: var(--ink); }
.axis { fill: none; stroke: var(--pale); } .grid { stroke: var(--line); }
.front { fill: none; stroke: var(--pale); stroke-dasharray: 5 4; } circle { stroke: var(--ground); stroke-width: 1; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2em 1.2em; padding: 0; margin: .2em 0; font-size: .85em; }
.legend span { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
.k0 { fill: #0072b2; background: #0072b2; } .k1 { fill: #e69f00; background: #e69f00; } .k2 { fill: #009e73; background: #009e73; }
.k3 { fill: #cc79a7; background: #cc79a7; } .k4 { fill: #d55e00; background: #d55e00; } .k5 { fill: #56b4e9; background: #56b4e9; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85em; white-space: nowrap; }
th, td { text-align: right; padding: .25em .7em; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, td.why { text-align: left; } tr.not td { color: var(--pale); } td.why { white-space: normal; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 1.2em; }
.pictures img { width: 49%; } .pictures figcaption { font-size: .85em; font-weight: 400; }
"""


def page(rows: Sequence[Row], pictures: Path) -> str:
    """The whole page of the rows that a suite measured, `pictures` being the folder that it saved theirs in."""
    first = rows[0]
    machine, title = first["hardware"], f"tightfit on {first['hardware']['name']}"
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    facts = f"{shown(machine['bytes'])}, {machine['cores']} cores; {first['date']}; {versions}"
    groups = groupby(sorted(rows, key=_group), key=_group)
    return "".join([
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1><p>{escape(facts)}</p>",
        *(f"<p><code>{escape(command)}</code></p>" for command in dict.fromkeys(row["command"] for row in rows)),
        *(_section(list(own), pictures) for _, own in groups),
        "</body></html>",
    ])  # fmt: skip


def _group(row: Row) -> tuple[str, int, int, int]:
    request = row["request"]
    return row["model"], request["width"], request["height"], request["steps"]


def _section(rows: list[Row], pictures: Path) -> str:
    model, width, height, steps = _group(rows[0])
    ran = sorted((row for row in rows if row["outcome"] == "ok"), key=_seconds)
    heading = f"<h2>{escape(Path(model).name)}, {width}x{height}, {steps} steps</h2>"
    about = f"<p>Medians of {rows[0]['request']['pictures']} pictures, after one to warm up; each plan in a process of its own.</p>"
    return heading + about + (_plots(ran) if ran else "") + _table(ran, rows) + _grid(ran, pictures)


def _seconds(row: Row) -> float:
    return statistics.median(row["seconds"])


def _plots(ran: list[Row]) -> str:
    """Each row as a point of each plot, and as a bar."""
    peaks = _bytes_axis("peak memory", [row["peak_bytes"] for row in ran])
    seconds = axis("seconds a picture", [_seconds(row) for row in ran], _number)
    judged = [row for row in ran if row.get("quality")]
    least = min((row["quality"]["psnr"] for row in judged), default=0.0)
    decibels = Axis("PSNR against the best precision, dB", min(least - 5, 60.0), MOST_PSNR + 3, False, _number)
    stages = [
        (row["plan"]["predicted"]["stages"][name], row["stages"][name]["peak_bytes"], name, row) for row in ran for name in STAGES
    ]
    costs = [_point(row, row["peak_bytes"], _seconds(row)) for row in ran]
    worth = [_point(row, row["peak_bytes"], row["quality"]["psnr"]) for row in judged]
    bytes_ = [Point(x, y, name, f"{row['summary']}, {name}: {shown(x)}, {shown(y)}") for x, y, name, row in stages if x and y]
    times = [_point(row, row["plan"]["predicted"]["seconds"], _seconds(row)) for row in ran]
    parts = {
        "Seconds against memory; dashed: no other is better in both": scatter(peaks, seconds, costs, front(ran)),
        "Quality against memory": scatter(peaks, decibels, worth) if worth else "",
        "Bytes of each stage, predicted and measured; dashed: the same": _against(bytes_, _bytes_axis, "bytes"),
        "Seconds, predicted and measured; dashed: the same": _against(times, _seconds_axis, "seconds"),
        "Where the seconds go": bars([(row["summary"], _by_stage(row)) for row in ran], STAGES, "s"),
    }
    figures = (f"<figure><figcaption>{name}</figcaption>{plot}</figure>" for name, plot in parts.items() if plot)
    return f'<div class="plots">{"".join(figures)}</div>'


def _point(row: Row, x: float, y: float) -> Point:
    decibels = f", {row['quality']['psnr']:.1f} dB" if row.get("quality") else ""
    text = f"{row['summary']}: {_seconds(row):.2f} s, {shown(row['peak_bytes'])}{decibels}"
    unet = row["plan"]["placements"]["unet"]
    return Point(x, y, unet["precision"] + ("" if unet["backend"] == "torch" else f", {unet['backend']}"), text)


def _by_stage(row: Row) -> list[float]:
    return [statistics.median(row["stages"][name]["seconds"]) for name in STAGES]


def _bytes_axis(label: str, values: Sequence[float]) -> Axis:
    return axis(label, values, shown, 2.0**30 if max(values, default=0) > 2**31 else 2.0**20)


def _seconds_axis(label: str, values: Sequence[float]) -> Axis:
    return axis(label, values, _number)


def _against(points: list[Point], make: Callable[[str, Sequence[float]], Axis], what: str) -> str:
    values = [value for point in points for value in (point.x, point.y)]
    x, y = make(f"predicted {what}", values), make(f"measured {what}", values)
    return scatter(x, y, points, [(x.low, x.low), (x.high, x.high)])


def front(ran: Sequence[Row]) -> list[tuple[float, float]]:
    """Peak bytes and seconds of those that no other beats in both, the smallest first."""
    found: list[tuple[float, float]] = []
    for peak, seconds in sorted((row["peak_bytes"], _seconds(row)) for row in ran):
        if not found or seconds < found[-1][1]:
            found.append((peak, seconds))
    return found


def _number(value: float) -> str:
    return f"{value:.3g}"


COLUMNS = (
    "plan", "s/picture", "±", "predicted", "first", "peak", "predicted is", "process", "on disk",
    "dB", "worst", "SSIM", "MS-SSIM", "J",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row as text, a cell for each of its figures behind the plan's."""
    told = row["plan"]["predicted"]
    quality = row.get("quality") or {}
    spread = (max(row["seconds"]) - min(row["seconds"])) / 2
    return [
        f"{_seconds(row):.2f}", f"{spread:.2f}", f"{told['seconds']:.2f}", f"{row['first_seconds']:.2f}",
        shown(row["peak_bytes"]), f"{told['peak_bytes'] / max(row['peak_bytes'], 1) - 1:+.1%}", shown(row["process_bytes"]),
        shown(row["disk_bytes"]),
        *(f"{quality[name]:.{digits}f}" if name in quality else "–"
          for name, digits in (("psnr", 1), ("psnr_worst", 1), ("ssim", 4), ("ms_ssim", 4))),
        f"{row['joules']:.0f}" if row.get("joules") is not None else "–",
    ]  # fmt: skip


def _table(ran: list[Row], rows: list[Row]) -> str:
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    lines = [f"<tr><td>{escape(row['summary'])}</td>{''.join(f'<td>{cell}</td>' for cell in cells(row))}</tr>" for row in ran]
    for row in (row for row in rows if row["outcome"] != "ok"):
        why = f'<td class="why" colspan="{len(COLUMNS) - 1}">{escape(row["outcome"])}: {escape(row["why"])}</td>'
        lines.append(f'<tr class="not"><td>{escape(row["summary"])}</td>{why}</tr>')
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _grid(ran: list[Row], pictures: Path) -> str:
    cards = [card for row in ran for card in _card(row, pictures)]
    about = (
        f"<p>The first picture of each, and how far it is off the best precision's, {_GAIN} times amplified.</p>" if cards else ""
    )
    return f'{about}<div class="pictures">{"".join(cards)}</div>' if cards else ""


def _card(row: Row, pictures: Path) -> Iterator[str]:
    own, other = (pictures / row[name] / "0.png" for name in ("key", "reference"))
    if not own.exists():
        return
    images = [_embedded(Image.open(own), row["summary"])]
    if own != other and other.exists():
        images.append(_embedded(difference(Image.open(own), Image.open(other), _GAIN), "difference"))
    decibels = f" · {row['quality']['psnr']:.1f} dB" if row.get("quality") else ""
    yield f"<figure>{''.join(images)}<figcaption>{escape(row['summary'])}{decibels}</figcaption></figure>"


def _embedded(image: Image.Image, text: str) -> str:
    image.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(text)}">'
