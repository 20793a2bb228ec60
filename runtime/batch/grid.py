"""Grids of pictures along up to three axes: rows of a table, and sheets and a page of what became of them."""

from __future__ import annotations

import base64
import csv
import html
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from ..errors import TightfitError
from ..files import shortened
from ..open_models import ASKABLE
from . import columns

if TYPE_CHECKING:
    from PIL import Image

REPLACED = "prompt_sr"
"""The axis whose first value is looked for in the prompt, and replaced by the others."""
MOST_CELLS = 10_000
_EXACT = "fp32"
_MOST_PIXELS = 2**26  # of a sheet
_PAGE_BYTES = 2**26  # of pictures in a page, beyond which they are JPEGs
_MARGIN, _LETTERS = 8, 40  # pixels; of a label
_INFINITE = 99.0


@dataclass(frozen=True)
class Axis:
    """A column and its values, None for a row without it."""

    name: str
    values: tuple[Any, ...]

    @classmethod
    def read(cls, text: str) -> Axis:
        """Of "steps=10,20,30", "seed=1..4" or "prompt_sr=cat,dog". Raises TightfitError."""
        name, equals, rest = text.partition("=")
        try:
            texts = next(csv.reader([rest], skipinitialspace=True), [])
        except csv.Error:
            texts = []
        if not equals or not texts:
            raise TightfitError(f"an axis is such as steps=10,20,30, not {shortened(text)}")
        if name.strip() == REPLACED:
            if not texts[0]:
                raise TightfitError(f"{REPLACED} begins with a word of the prompt: {REPLACED}=cat,dog")
            return cls(REPLACED, tuple(texts))
        column = columns.column(name)
        if column in (columns.NAME, "num_images"):
            raise TightfitError(f"{column} is no axis: choose another column")
        read = (columns.read(column, one) for one in texts)
        values = [
            one for value in read for one in ([None] if value is None else columns.choices(column, value))
        ]
        return cls(column, tuple(values))

    def row(self, index: int, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with value `index`. Raises TightfitError for a word that is not in the prompt."""
        value = self.values[index]
        if self.name != REPLACED:
            return {**row, self.name: value} if value is not None else {**row}
        searched, prompt = self.values[0], row.get("prompt")
        if not isinstance(prompt, str) or searched not in prompt:
            raise TightfitError(f"{shortened(searched)} of {REPLACED} is not in the prompt: name words of it")
        return {**row, "prompt": prompt.replace(searched, value)}

    def said(self, index: int) -> str:
        """A value as text."""
        value = self.values[index]
        if isinstance(value, list):
            return ", ".join(map(str, value))
        return "none" if value is None else str(value)

    def label(self, index: int) -> str:
        """A value with the axis's name, but for words of the prompt."""
        return self.said(index) if self.name == REPLACED else f"{self.name}: {self.said(index)}"

    @property
    def exact(self) -> int | None:
        """Of ways to run, the value that others are measured by: fp32, or the first."""
        if self.name not in ASKABLE:
            return None
        return self.values.index(_EXACT) if _EXACT in self.values else 0


Place = tuple[int, int, int]
"""Indices along x, y and z."""


@dataclass(frozen=True)
class Grid:
    """Axes x, y and z, of which the last may be of one value without a name."""

    axes: tuple[Axis, Axis, Axis]

    @classmethod
    def read(cls, x: str, y: str | None, z: str | None) -> Grid:
        """Raises TightfitError."""
        axes = [Axis.read(text) if text else Axis("", (None,)) for text in (x, y, z)]
        names = [axis.name for axis in axes if axis.name]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise TightfitError(f"two axes are {twice}: name another")
        if (count := math.prod(len(axis.values) for axis in axes)) > MOST_CELLS:
            raise TightfitError(
                f"{count} cells are asked for, and {MOST_CELLS} are the most: name fewer values"
            )
        return cls((axes[0], axes[1], axes[2]))

    @property
    def places(self) -> list[Place]:
        """In the order of the rows."""
        x, y, z = (range(len(axis.values)) for axis in self.axes)
        return [(i, j, k) for k, j, i in itertools.product(z, y, x)]

    def rows(self, row: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """A row for each cell, from 1; the prompt's words are replaced first."""
        for number, place in enumerate(self.places, 1):
            cell = {**row, columns.NAME: "cells/" + "-".join(str(index + 1) for index in place)}
            pairs = sorted(zip(self.axes, place, strict=True), key=lambda pair: pair[0].name != REPLACED)
            for axis, index in pairs:
                cell = axis.row(index, cell) if axis.name else cell
            yield number, cell

    def exact(self, place: Place) -> Place | None:
        """The cell that this one is measured by, if any is."""
        exact = tuple(
            index if axis.exact is None else axis.exact for axis, index in zip(self.axes, place, strict=True)
        )
        is_measured = any(axis.exact is not None for axis in self.axes)
        return (exact[0], exact[1], exact[2]) if is_measured and exact != place else None

    def notes(self, cells: Mapping[Place, Image.Image]) -> dict[Place, str]:
        """Beside each cell its PSNR, where an axis is of ways to run."""
        return {
            place: f"{psnr(image, cells[other]):.1f} dB"
            for place, image in cells.items()
            if (other := self.exact(place)) in cells and other is not None
        }


def psnr(image: Image.Image, other: Image.Image) -> float:
    """Decibels of one picture against another of its size; 99 is the same, and 0 another size."""
    import numpy as np

    if image.size != other.size:
        return 0.0
    difference = np.asarray(image.convert("RGB"), np.float64) - np.asarray(other.convert("RGB"), np.float64)
    mean = float((difference**2).mean())
    return min(_INFINITE, 10 * math.log10(255**2 / mean)) if mean else _INFINITE


def sheet(grid: Grid, cells: Mapping[Place, Image.Image], notes: Mapping[Place, str], k: int) -> Image.Image:
    """One value of z as a picture: cells in rows and columns, with the labels of x above and of y beside."""
    from PIL import Image, ImageDraw, ImageFont

    x, y, z = grid.axes
    own = {(i, j): cells[i, j, at] for i, j, at in cells if at == k}
    width = max((image.width for image in own.values()), default=64)
    height = max((image.height for image in own.values()), default=64)
    scale = min(1.0, math.sqrt(_MOST_PIXELS / (width * height * len(x.values) * len(y.values))))
    width, height = max(1, int(width * scale)), max(1, int(height * scale))
    letters = min(24, max(12, width // 16))
    font = ImageFont.load_default(letters)
    line = letters + _MARGIN
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    fitted = lambda text, room: _fitted(measure, font, text, room)  # noqa: E731
    beside = [_short(y.said(j)) if y.name else "" for j in range(len(y.values))]
    left = int(max((measure.textlength(text, font) for text in beside), default=0)) + _MARGIN
    named = [f"{where} {axis.name}" for where, axis in (("across:", x), ("down:", y)) if axis.name]
    title = "    ".join([*named, _short(z.label(k))] if z.name else named)
    top = line * 2 + _MARGIN
    below = line if notes else 0
    across = max(left + len(x.values) * (width + _MARGIN), int(measure.textlength(title, font)) + 2 * _MARGIN)
    whole = Image.new("RGB", (across, top + len(y.values) * (height + below + _MARGIN)), "white")
    draw = ImageDraw.Draw(whole)
    draw.text((_MARGIN, _MARGIN), title, "#555555", font)
    for i in range(len(x.values)):
        draw.text((left + i * (width + _MARGIN), top - line), fitted(x.said(i), width), "black", font)
    for j, text in enumerate(beside):
        draw.text((_MARGIN // 2, top + j * (height + below + _MARGIN) + height // 2), text, "black", font)
    for (i, j), image in own.items():
        corner = left + i * (width + _MARGIN), top + j * (height + below + _MARGIN)
        small = image if scale == 1 else image.resize((int(image.width * scale), int(image.height * scale)))
        whole.paste(small, corner)
        if note := notes.get((i, j, k)):
            draw.text((corner[0], corner[1] + height + 2), note, "#555555", font)
    return whole


def _short(text: str) -> str:
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS - 1]}…"


def _fitted(draw: Any, font: Any, text: str, room: int) -> str:
    """As much of a label as has room."""
    while text and draw.textlength(text, font) > room:
        text = f"{text[:-2]}…" if len(text) > 2 else ""
    return text


_STYLE = """
body { font: 15px system-ui, sans-serif; margin: 1.5rem; color: #222; background: #fff }
table { border-collapse: collapse } th, td { padding: 4px; text-align: center; vertical-align: middle }
th { font-weight: 600; max-width: 24rem; overflow-wrap: anywhere } td small { display: block; color: #555 }
label { display: inline-block; margin: 0 2rem 1rem 0 } input { vertical-align: middle }
img { width: calc(var(--width) * var(--zoom, 1)); height: auto; display: block; margin: auto }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 } td small { color: #aaa } }
"""
_SCRIPT = """
const zoom = document.getElementById('zoom'), z = document.getElementById('z');
const show = () => {
  document.body.style.setProperty('--zoom', zoom.value);
  if (!z) return;
  document.querySelectorAll('table').forEach((table, k) => { table.hidden = k !== +z.value; });
  document.getElementById('said').textContent = document.querySelectorAll('table')[+z.value].dataset.said;
};
[zoom, z].forEach((slider) => slider && slider.addEventListener('input', show));
show();
"""


def page(title: str, grid: Grid, cells: Mapping[Place, Image.Image], notes: Mapping[Place, str]) -> str:
    """All sheets as a page of its own, with a slider for z and one for the size."""
    x, y, z = grid.axes
    pixels = sum(image.width * image.height for image in cells.values())
    form = "PNG" if 2 * pixels < _PAGE_BYTES else "JPEG"
    tables = []
    for k in range(len(z.values)):
        head = "".join(f"<th>{html.escape(x.label(i))}</th>" for i in range(len(x.values)))
        lines = [
            f"<tr><th>{html.escape(y.label(j)) if y.name else ''}</th>"
            + "".join(_cell(grid, cells, notes, (i, j, k), form) for i in range(len(x.values)))
            + "</tr>"
            for j in range(len(y.values))
        ]
        said = html.escape(z.label(k)) if z.name else ""
        hidden = " hidden" if k else ""
        rows = f"<tr><th></th>{head}</tr>{''.join(lines)}"
        tables.append(f'<table data-said="{said}"{hidden}>{rows}</table>')
    span = f'type="range" min="0" max="{len(z.values) - 1}" value="0"'
    slider = f'<label>{html.escape(z.name)} <input id="z" {span}> <output id="said"></output></label>'
    slider = slider if z.name else ""
    size = '<label>size <input id="zoom" type="range" min="0.25" max="4" step="0.25" value="1"></label>'
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><div>{slider}{size}</div>"
        f"{''.join(tables)}<script>{_SCRIPT}</script></html>\n"
    )


def _cell(
    grid: Grid, cells: Mapping[Place, Image.Image], notes: Mapping[Place, str], place: Place, form: str
) -> str:
    if (image := cells.get(place)) is None:
        return "<td>failed</td>"
    stream = BytesIO()
    image.convert("RGB").save(stream, form, **({"quality": 90} if form == "JPEG" else {}))
    data = base64.b64encode(stream.getvalue()).decode()
    pairs = zip(grid.axes, place, strict=True)
    said = html.escape(", ".join(axis.label(index) for axis, index in pairs if axis.name), quote=True)
    note = f"<small>{html.escape(notes[place])}</small>" if place in notes else ""
    source = f"data:image/{form.lower()};base64,{data}"
    return f'<td><img style="--width: {image.width}px" alt="{said}" title="{said}" src="{source}">{note}</td>'


def titled(prompt: str, names: Sequence[str]) -> str:
    """What a page is called."""
    return f"{' × '.join(names)}: {prompt}"
