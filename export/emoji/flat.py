"""The same emoji in another style: Microsoft's Fluent flat emoji (MIT), npm `@lobehub/fluent-emoji-flat`.

The package holds SVG, which is drawn once into the work folder. That takes `pip install resvg-py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from . import data

PACKAGE = "@lobehub/fluent-emoji-flat@1.1.0"
_SIDE = 256  # as the 3D pictures are


def fetch(folder: Path) -> None:
    """Download the pictures into `folder` (6 MB) and draw those of the chosen emoji, unless it is done."""
    data.fetch(folder)
    data.fetch(folder, (PACKAGE,))
    missing = [one.picture for one in emoji(folder) if not one.picture.exists()]
    if not missing:
        return
    try:
        import resvg_py  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SystemExit("the flat emoji are SVG, and nothing here draws it: pip install resvg-py") from None
    _drawn(folder).mkdir(exist_ok=True)
    for picture in missing:
        drawing = folder / "lobehub-fluent-emoji-flat/package/assets" / f"{picture.stem}.svg"
        rendered = resvg_py.svg_to_bytes(svg_path=str(drawing), width=_SIDE, height=_SIDE)
        partial = picture.with_suffix(".partial")
        partial.write_bytes(bytes(rendered))
        partial.replace(picture)


def emoji(folder: Path) -> list[data.Emoji]:
    """Those of `data.emoji`, in their order, each with its flat picture."""
    return [replace(one, picture=_drawn(folder) / f"{one.picture.stem}.png") for one in data.emoji(folder)]


def _drawn(folder: Path) -> Path:
    return folder / "flat"
