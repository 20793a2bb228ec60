"""Plots as SVG text: axes with round ticks, points, bars. No plotting library writes so little in so few
bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 560, 340, 78, 46, 14, 16


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, optionally `logarithmic`. `shown` formats a value; ticks are round in `unit`s,
    such as MiB."""

    label: str
    low: float
    high: float
    logarithmic: bool
    shown: Callable[[float], str]
    unit: float = 1.0

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        if self.logarithmic:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values: 1, 2 and 5 of each power of ten if logarithmic, else at most seven steps of 1, 2, 5
        or 10."""
        low, high = self.low / self.unit, self.high / self.unit
        if self.logarithmic:
            first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
            ticks = [
                m * 10.0**p for p in range(first, last + 1) for m in (1, 2, 5) if low <= m * 10.0**p <= high
            ]
            kept = ticks if len(ticks) <= 8 else [value for value in ticks if math.log10(value).is_integer()]
            return [value * self.unit for value in kept]
        rough = (high - low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
        return [i * step * self.unit for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def axis(label: str, values: Iterable[float], shown: Callable[[float], str], unit: float = 1.0) -> Axis:
    """An axis with room for `values`: from zero, or logarithmic if they span a factor of ten."""
    positive = [value for value in values if value > 0] or [unit]
    low, high = min(positive), max(positive)
    if high > 10 * low:
        return Axis(label, low / 1.25, high * 1.25, True, shown, unit)
    return Axis(label, 0.0, high * 1.08, False, shown, unit)


@dataclass(frozen=True)
class Point:
    """At x and y; `kind` gives the colour, `text` the tooltip."""

    x: float
    y: float
    kind: str
    text: str


def scatter(
    x: Axis,
    y: Axis,
    points: Sequence[Point],
    colours: Mapping[str, str],
    line: Sequence[tuple[float, float]] = (),
) -> str:
    """Points and a line, with a legend. `colours` maps kinds to CSS classes, the same in every plot of a
    page."""
    kinds = list(dict.fromkeys(point.kind for point in points))
    parts = [_frame(x, y)]
    if line:
        path = " ".join(f"{_x(x, a):.1f},{_y(y, b):.1f}" for a, b in line)
        parts.append(f'<polyline class="front" points="{path}"/>')
    for point in points:
        place = f'cx="{_x(x, point.x):.1f}" cy="{_y(y, point.y):.1f}"'
        parts.append(
            f'<circle class="{colours[point.kind]}" {place} r="5">'
            f"<title>{escape(point.text)}</title></circle>"
        )
    return _svg(f"{y.label} against {x.label}", parts, _HEIGHT) + legend(
        {kind: colours[kind] for kind in kinds}
    )


def bars(rows: Sequence[tuple[str, Sequence[float]]], colours: Mapping[str, str], unit: str) -> str:
    """A stacked bar per row: its name above, its parts in the order of `colours`, their sum at the end."""
    most = max((sum(parts) for _, parts in rows), default=1.0) or 1.0
    height, out, kinds = 40 * len(rows) + 8, [], list(colours)
    for number, (name, parts) in enumerate(rows):
        top, start = 40 * number + 4, 0.0
        out.append(f'<text x="2" y="{top + 12}" class="name">{escape(name)}</text>')
        for place, part in enumerate(parts):
            width = part / most * (_WIDTH - 70)
            title = f"<title>{escape(f'{kinds[place]}: {part:.3g} {unit}')}</title>"
            colour = colours[kinds[place]]
            out.append(
                f'<rect class="{colour}" x="{2 + start:.1f}" y="{top + 17}" '
                f'width="{width:.1f}" height="14">{title}</rect>'
            )
            start += width
        out.append(f'<text x="{start + 8:.1f}" y="{top + 29}">{sum(parts):.3g} {unit}</text>')
    return _svg(f"{unit} of each", out, height) + legend(colours)


def legend(colours: Mapping[str, str]) -> str:
    items = "".join(
        f'<li><span class="{colour}"></span>{escape(kind)}</li>' for kind, colour in colours.items()
    )
    return f'<ul class="legend">{items}</ul>'


def _frame(x: Axis, y: Axis) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>']
    for value in x.ticks():
        at = _x(x, value)
        parts.append(f'<path class="grid" d="M{at:.1f} {_TOP}V{bottom}"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(x.shown(value))}</text>'
        )
    for value in y.ticks():
        at = _y(y, value)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{right}"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{escape(y.shown(value))}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x.label)}</text>'
    )
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 14 {middle})">{escape(y.label)}</text>'
    )
    return "".join(parts)


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.place(value) * (_WIDTH - _RIGHT - _LEFT)


def _y(axis: Axis, value: float) -> float:
    return _HEIGHT - _BOTTOM - axis.place(value) * (_HEIGHT - _BOTTOM - _TOP)


def _svg(label: str, parts: Iterable[str], height: int) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
