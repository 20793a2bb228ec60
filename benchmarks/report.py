"""One self-contained page: what each plan cost and gave, as plots, a table and pictures."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from ..runtime.errors import explained
from ..runtime.models.families.networks import UNET
from ..runtime.placement import BACKENDS, PRECISIONS, STAGES
from ..runtime.units import shown
from .compare import figures, identity, seconds, spread
from .metrics import difference
from .plots import Axis, Point, axis, bars, scatter

Row = dict[str, Any]
_SIDE = 256  # pixels of a picture on the page
_GAIN = 8
_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1c1c1e, #e8e8ea); --pale: light-dark(#6b6b70, #a0a0a6);
  --line: light-dark(#e2e2e6, #3a3a3e); --ground: light-dark(#fff, #18181a); }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 1240px;
 margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.6em; margin-bottom: 0; } h2 { font-size: 1.2em; margin: 2em 0 .2em; }
p { color: var(--pale); margin: .2em 0 1em; }
code { font-size: .9em; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 1.5em; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
svg text { font-size: 12px; fill: var(--pale); } svg .name { fill: var(--ink); }
.axis { fill: none; stroke: var(--pale); } .grid { stroke: var(--line); }
.front { fill: none; stroke: var(--pale); stroke-dasharray: 5 4; }
 circle { stroke: var(--ground); stroke-width: 1; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2em 1.2em; padding: 0; margin: .2em 0;
 font-size: .85em; }
.legend span { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
.k0 { fill: #0072b2; background: #0072b2; } .k1 { fill: #e69f00; background: #e69f00; }
 .k2 { fill: #009e73; background: #009e73; }
.k3 { fill: #cc79a7; background: #cc79a7; } .k4 { fill: #d55e00; background: #d55e00; }
 .k5 { fill: #56b4e9; background: #56b4e9; }
.encode { fill: #b8b8b8; background: #b8b8b8; } .denoise { fill: #7a5195; background: #7a5195; }
.decode { fill: #8c6d31; background: #8c6d31; } circle.onnx { fill-opacity: .25; stroke: currentColor; }
 circle.cached { fill-opacity: .5; stroke: currentColor; }
 .legend .cached { opacity: .6; outline: 1px dotted; }
.legend .onnx { opacity: .45; outline: 1px solid; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85em; white-space: nowrap; }
th, td { text-align: right; padding: .25em .5em; border-bottom: 1px solid var(--line);
 font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, td.why { text-align: left; } tr.not td { color: var(--pale); }
 td.why { white-space: normal; }
td:first-child { white-space: normal; min-width: 15em; } p.terms { font-size: .8em; margin: .5em 0 2em; }
@media (max-width: 600px) { svg text:not(.name) { font-size: 16px; } td:first-child { min-width: 9em; } }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 1.2em; }
.pictures img { width: 49%; } .pictures figcaption { font-size: .85em; font-weight: 400; }
"""


def page(rows: Sequence[Row], pictures: Path) -> str:
    """The page for a suite's rows; `pictures` is the folder with their pictures."""
    first = rows[0]
    machine, title = first["hardware"], f"tightfit on {first['hardware']['name']}"
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    facts = (
        f"{shown(machine['bytes'])}, {machine['cores']} cores, {machine['threads']} threads; "
        f"{first['date']}; {versions}"
    )
    return "".join([
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1><p>{escape(facts)}</p>",
        *(f"<p><code>{escape(command)}</code></p>"
          for command in dict.fromkeys(row["command"] for row in rows)),
        *(_section(group, pictures) for group in groups(rows)),
        "</body></html>",
    ])  # fmt: skip


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows grouped by model, size and number of steps."""
    return [list(group) for _, group in groupby(sorted(rows, key=_group), key=_group)]


def title(rows: Sequence[Row]) -> str:
    model, width, height, steps = _group(rows[0])
    return f"{Path(model).name}, {width}x{height}, {steps} steps"


def _group(row: Row) -> tuple[str, int, int, int]:
    request = row["request"]
    return row["model"], request["width"], request["height"], request["steps"]


def _section(rows: list[Row], pictures: Path) -> str:
    ran = sorted((row for row in rows if row["outcome"] == "ok"), key=seconds)
    heading = f"<h2>{escape(title(rows))}</h2>"
    count = (
        max((len(row["seconds"]) for row in ran), default=0),
        max((len(row["runs"]) for row in ran), default=0),
    )
    about = (
        f"<p>{count[0]} pictures of each plan in {count[1]} processes of its own, "
        "in turns with the others'.</p>"
    )
    best = "".join(f"<p>{escape(line)}</p>" for line in advice(rows))
    return heading + about + (_plots(ran) if ran else "") + _table(rows) + best + _grid(ran, pictures)


# Colours, the same on every page: one per precision, paler for another engine.
_STAGE_COLOURS = {name: name for name in STAGES}


def _colours() -> dict[str, str]:
    plain = {precision: f"k{number}" for number, precision in enumerate(PRECISIONS)}
    paler = {
        _kind(precision, engine): f"{colour} {engine}"
        for precision, colour in plain.items()
        for engine in BACKENDS[1:]
    }
    cached = {_kind(precision, BACKENDS[0], 2): f"{colour} cached" for precision, colour in plain.items()}
    return plain | paler | cached


def _kind(precision: str, engine: str, step_cache: int = 1) -> str:
    said = precision if engine == BACKENDS[0] else f"{precision}, {engine}"
    return f"{said}, cached" if step_cache > 1 else said


def _step_cache(row: Row) -> int:
    """Of how many steps one is in full; lines of before have none."""
    return row["plan"].get("step_cache", 1)


def _plots(ran: list[Row]) -> str:
    """Each row as a point in each plot, and as a bar."""
    peaks = _bytes_axis("peak memory", [row["peak_bytes"] for row in ran])
    paces = axis("seconds a picture", [seconds(row) for row in ran], _number)
    judged = [row for row in ran if row["quality"] and row["key"] != row["reference"]]
    values = [row["quality"]["psnr"] for row in judged]
    decibels = Axis(
        "PSNR against the best precision, dB",
        min(values, default=0) - 3,
        max(values, default=0) + 3,
        False,
        _number,
    )
    stages = [
        (row["plan"]["predicted"]["stages"][name], row["stages"][name]["peak_bytes"], name, row)
        for row in ran
        for name in STAGES
    ]
    costs = [_point(row, row["peak_bytes"], seconds(row)) for row in ran]
    worth = [_point(row, row["peak_bytes"], row["quality"]["psnr"]) for row in judged]
    bytes_ = [
        Point(x, y, name, f"{row['summary']}, {name}: {shown(x)}, {shown(y)}")
        for x, y, name, row in stages
        if x and y
    ]
    cached = [row for row in judged if _step_cache(row) > 1]
    pays = [_point(row, seconds(row), row["quality"]["psnr"]) for row in judged if cached]
    times = [_point(row, row["plan"]["predicted"]["seconds"], seconds(row)) for row in ran]
    kinds = _colours()
    parts = {
        "Seconds against memory; dashed: no other is better in both": scatter(
            peaks, paces, costs, kinds, front(ran)
        ),
        "Quality against memory": scatter(peaks, decibels, worth, kinds) if worth else "",
        "Quality against seconds; cached: one step of several in full": scatter(paces, decibels, pays, kinds)
        if pays
        else "",
        "Bytes of each stage, predicted and measured; dashed: the same": _against(
            bytes_, _STAGE_COLOURS, _bytes_axis, "bytes"
        ),
        "Seconds, predicted and measured; dashed: the same": _against(times, kinds, _seconds_axis, "seconds"),
        "Where the seconds go": bars([(row["summary"], _by_stage(row)) for row in ran], _STAGE_COLOURS, "s"),
    }
    figures = (
        f"<figure><figcaption>{name}</figcaption>{plot}</figure>" for name, plot in parts.items() if plot
    )
    return f'<div class="plots">{"".join(figures)}</div>'


def _point(row: Row, x: float, y: float) -> Point:
    text = f"{row['summary']}: {figures(row)}"
    unet = row["plan"]["placements"][UNET.name]
    return Point(x, y, _kind(unet["precision"], unet["backend"], _step_cache(row)), text)


def _by_stage(row: Row) -> list[float]:
    return [statistics.median(row["stages"][name]["seconds"]) for name in STAGES]


def _bytes_axis(label: str, values: Sequence[float]) -> Axis:
    return axis(label, values, shown, 2.0**30 if max(values, default=0) > 2**31 else 2.0**20)


def _seconds_axis(label: str, values: Sequence[float]) -> Axis:
    return axis(label, values, _number)


def _against(
    points: list[Point],
    colours: Mapping[str, str],
    make: Callable[[str, Sequence[float]], Axis],
    quantity: str,
) -> str:
    values = [value for point in points for value in (point.x, point.y)]
    x, y = make(f"predicted {quantity}", values), make(f"measured {quantity}", values)
    return scatter(x, y, points, colours, [(x.low, x.low), (x.high, x.high)])


def front(ran: Sequence[Row]) -> list[tuple[float, float]]:
    """Peak bytes and seconds of the rows that no other beats in both, the smallest first."""
    best: list[tuple[float, float]] = []
    for peak, pace in sorted((row["peak_bytes"], seconds(row)) for row in ran):
        if not best or pace < best[-1][1]:
            best.append((peak, pace))
    return best


def _number(value: float) -> str:
    return f"{value:.3g}"


# Columns and what they mean.
COLUMNS = {
    "s/picture": "median seconds per picture, warm",
    "±": "half the range of the processes' medians, in seconds",
    "predicted s": "the same, predicted",
    "saves": "what cached steps take off the seconds of the same plan with all in full",
    "warm-up s": "a process's first picture, with one step: loading and preparing",
    "peak": "peak bytes of the device's allocator (on a CPU: of tensors)",
    "predicted": "error of the predicted peak",
    "process": "peak memory of the process",
    "on disk": "bytes of the weights' files",
    "dB": "PSNR against the best precision's pictures of the same seeds, median",
    "least dB": "the same, worst picture",
    "SSIM": "structural similarity to those pictures, median",
    "MS-SSIM": "the same at several scales",
    "LPIPS": "perceptual distance to those pictures (AlexNet), median",
    "match": "share of pictures nearer to their own emoji than to the other 458",
    "J/picture": "energy per picture, by the driver's count",
}


def cells(row: Row, whole: Row | None = None) -> list[str]:
    """A row as text, one cell per column of COLUMNS; "" for what was not measured. `whole` is the same with
    all steps in full, where the row's are cached."""
    predicted, quality, exact = row["plan"]["predicted"], row["quality"] or {}, row["key"] == row["reference"]
    measures = {"psnr": 1, "psnr_worst": 1, "ssim": 4, "ms_ssim": 4, "lpips": 4}
    return [
        f"{seconds(row):.3g}", f"{spread(row):.2g}" if len(row["runs"]) > 1 else "",
        f"{predicted['seconds']:.3g}",
        f"{seconds(whole) - seconds(row):.3g} s, {seconds(whole) / seconds(row):.2f}×" if whole else "",
        f"{row['warmup_seconds']:.3g}", shown(row["peak_bytes"]),
        f"{predicted['peak_bytes'] / max(row['peak_bytes'], 1) - 1:+.1%}", shown(row["process_bytes"]),
        shown(row["disk_bytes"]),
        *("exact" if exact and name == "psnr"
          else "" if exact or name not in quality else f"{quality[name]:.{digits}f}"
          for name, digits in measures.items()),
        f"{quality['match']:.0%}" if "match" in quality else "",
        f"{row['joules']:.3g}" if row["joules"] is not None else "",
    ]  # fmt: skip


def table(rows: Sequence[Row]) -> tuple[list[str], list[tuple[Row, list[str]]]]:
    """Columns in which some row has a figure, and the rows' cells: fastest first, then those that did not
    run."""
    ran = sorted((row for row in rows if row["outcome"] == "ok"), key=seconds)
    whole = {identity(row): row for row in ran if _step_cache(row) == 1}
    every = [cells(row, whole.get(identity(row, 1)) if _step_cache(row) > 1 else None) for row in ran]
    filled = [i for i, _ in enumerate(COLUMNS) if any(texts[i] for texts in every)]
    lines = [(row, [texts[i] for i in filled]) for row, texts in zip(ran, every, strict=True)]
    return [list(COLUMNS)[i] for i in filled], lines + [(row, []) for row in rows if row["outcome"] != "ok"]


def advice(rows: Sequence[Row]) -> list[str]:
    """The measured fastest plan for each budget, one line per plan."""
    lines: dict[str, list[int]] = {}
    for budget in BUDGETS:
        room = [row for row in rows if row["outcome"] == "ok" and _taken(row) <= budget * 2**30]
        if best := min(room, key=seconds, default=None):
            lines.setdefault(f"{best['summary']}: {figures(best)}", []).append(budget)
    return [
        f"fastest within {' to '.join(map(str, sorted({budgets[0], budgets[-1]})))} GiB: {text}"
        for text, budgets in lines.items()
    ]


BUDGETS = (1, 2, 4, 6, 8, 12, 16, 24)  # GiB that cards have


def _taken(row: Row) -> int:
    """Bytes on a card: tensors and the device's context; on a CPU the whole process."""
    return (
        row["process_bytes"]
        if row["plan"]["device"] == "cpu"
        else row["peak_bytes"] + row["plan"]["predicted"]["context_bytes"]
    )


def _table(rows: list[Row]) -> str:
    columns, lines = table(rows)
    head = "<th>plan</th>" + "".join(
        f'<th title="{escape(COLUMNS[name])}">{escape(name)}</th>' for name in columns
    )
    body = [
        f"<tr><td>{escape(row['summary'])}</td>{''.join(f'<td>{cell}</td>' for cell in texts)}</tr>"
        if texts
        else f'<tr class="not"><td>{escape(row["summary"])}</td><td class="why" colspan="{len(columns)}">'
        f"{escape(row['outcome'])}: {escape(row['why'])}</td></tr>"
        for row, texts in lines
    ]
    legend = "; ".join(f"{name}: {COLUMNS[name]}" for name in columns)
    table_html = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll">{table_html}</div><p class="terms">{escape(legend)}.</p>'


def _grid(ran: list[Row], pictures: Path) -> str:
    cards = [card for row in ran for card in _card(row, pictures)]
    about = (
        "<p>The first picture of each, and how far it is off the best precision's, "
        f"{_GAIN} times amplified.</p>"
        if cards
        else ""
    )
    return f'{about}<div class="pictures">{"".join(cards)}</div>' if cards else ""


def _card(row: Row, pictures: Path) -> Iterator[str]:
    picture, exact = (pictures / row[name] / "0.png" for name in ("key", "reference"))
    if not picture.exists():
        return
    with explained(f"{picture} or {exact} is no picture that can be shown", "remove it"):
        images = [_embedded(Image.open(picture), row["summary"])]
        if picture != exact and exact.exists():
            images.append(_embedded(difference(Image.open(picture), Image.open(exact), _GAIN), "difference"))
    yield (
        f"<figure>{''.join(images)}<figcaption>{escape(row['summary'])}: {figures(row)}</figcaption></figure>"
    )


def _embedded(image: Image.Image, text: str) -> str:
    image.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(text)}">'
