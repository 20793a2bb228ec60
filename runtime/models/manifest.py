"""tightfit.json, which `tightfit export` writes into a model's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import TightfitError
from ..files import read_json

MANIFEST_VERSION = 1  # of tightfit.json


def read_manifest(folder: Path) -> Mapping[str, Any]:
    """The folder's tightfit.json, or {} without one: defaults, precision, components."""
    file = folder / "tightfit.json"
    data = read_json(file) if file.exists() else {}
    version = data.get("version", MANIFEST_VERSION)
    if isinstance(version, int) and version > MANIFEST_VERSION:
        raise TightfitError(
            f"{file} was written by a newer tightfit: update this one, or export the model again"
        )
    if not _understood(data):
        raise TightfitError(
            f"{file} cannot be understood: delete it if the model is not quantised, or export the model again"
        )
    return data


def _understood(manifest: Mapping[str, Any]) -> bool:
    defaults, components = manifest.get("defaults", {}), manifest.get("components", {})
    if not isinstance(defaults, dict) or not isinstance(defaults.get("guidance_scale", 1.0), int | float):
        return False
    if manifest.get("precision") not in (None, "fp32", "fp16", "int8", "int4") or not isinstance(
        components, dict
    ):
        return False
    parts = [
        entry.get(part, {}) if isinstance(entry, dict) else None
        for entry in components.values()
        for part in ("formats", "sha256")
    ]
    texts = [
        manifest.get("source"),
        *(name for entry in parts if isinstance(entry, dict) for name in entry.values()),
    ]
    return all(isinstance(entry, dict) for entry in parts) and all(
        isinstance(name, str | None) for name in texts
    )
