"""The emoji the model in the box is trained on: fetched with npm, drawn on white, captioned.

Pictures: Microsoft's Fluent 3D emoji (MIT), npm package `@lobehub/fluent-emoji-3d`. Labels and tags: npm
package `emojibase-data` (MIT). Both are fetched once into a folder that stays outside the repository.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGES = ("@lobehub/fluent-emoji-3d@1.1.0", "emojibase-data@17.0.0")

# Fewer groups rather than blurred pictures: what a person would ask an emoji painter for first.
SUBGROUPS = {
    "smileys-emotion": (
        "face-smiling", "face-affection", "face-hat", "face-glasses", "face-costume", "heart",
    ),
    "animals-nature": (
        "animal-mammal", "animal-bird", "animal-amphibian", "animal-reptile", "animal-marine", "animal-bug",
        "plant-flower", "plant-other",
    ),
    "food-drink": ("food-fruit", "food-vegetable", "food-prepared", "food-asian", "food-sweet", "drink"),
    "travel-places": ("transport-ground", "transport-water", "transport-air", "sky-weather"),
}  # fmt: skip


@dataclass(frozen=True)
class Emoji:
    label: str
    tags: tuple[str, ...]
    picture: Path


def fetch(folder: Path, packages: tuple[str, ...] = PACKAGES) -> None:
    """Download and unpack npm packages into `folder` (PACKAGES: 38 MB) unless they are there. Needs npm."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        target = folder / package.strip("@").replace("/", "-").rsplit("@", 1)[0]
        if target.exists():
            continue
        packed = subprocess.run(
            ["npm", "pack", package, "--silent"], cwd=folder, check=True, text=True, capture_output=True
        )
        archive, partial = folder / packed.stdout.strip(), target.with_suffix(".partial")
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        partial.rename(target)
        archive.unlink()


def emoji(folder: Path) -> list[Emoji]:
    """The emoji of SUBGROUPS that have a picture, in Unicode order; skin tones are not among emojibase's top
    level."""
    text = folder / "emojibase-data/package/en"
    messages = json.loads((text / "messages.json").read_text())
    group = {row["order"]: row["key"] for row in messages["groups"]}
    subgroup = {row["order"]: row["key"] for row in messages["subgroups"]}
    pictures = {p.stem: p for p in sorted((folder / "lobehub-fluent-emoji-3d/package/assets").glob("*.webp"))}
    chosen = []
    for row in sorted(json.loads((text / "data.json").read_text()), key=lambda row: row.get("order", 0)):
        if subgroup.get(row.get("subgroup")) not in SUBGROUPS.get(group.get(row.get("group"), ""), ()):
            continue
        code = row["hexcode"].lower()
        picture = next(
            (pictures[c] for c in (code, code.replace("-fe0f", ""), code + "-fe0f") if c in pictures), None
        )
        if picture:
            chosen.append(
                Emoji(row["label"].lower(), tuple(tag.lower() for tag in row.get("tags", ())), picture)
            )
    return chosen


def pixels(chosen: list[Emoji], size: int) -> np.ndarray:
    """uint8 (count, size, size, 3): each picture composed on white, then resized."""
    out = np.empty((len(chosen), size, size, 3), np.uint8)
    for i, one in enumerate(chosen):
        with Image.open(one.picture) as picture:
            rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        out[i] = np.asarray(
            Image.alpha_composite(white, rgba).convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
        )
    return out
