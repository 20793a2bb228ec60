"""What is kept in the cache folder between commands: JSON values, and hashes of files."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import TightfitError
from .files import cache_folder, parsed, read_bytes, replacing, sha256


class Kept:
    """JSON values in a file of the cache folder. What cannot be read or written is computed again."""

    def __init__(self, name: str, most: int) -> None:
        self._file, self._most = cache_folder() / name, most
        try:
            values = parsed(read_bytes(self._file))
        except (OSError, ValueError, TightfitError):
            values = {}
        self._values: dict[str, Any] = values if isinstance(values, dict) else {}

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep it, in place of the oldest where there are too many."""
        self._values.pop(key, None)
        self._values[key] = value
        self._values = dict([*self._values.items()][-self._most :])
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._file) as partial:
                partial.write_text(json.dumps(self._values), encoding="utf-8")


class Hashes:
    """SHA-256 of files, kept by path, size and time: to read 2 GB takes 4 s."""

    def __init__(self) -> None:
        self._kept = Kept("hashes.json", 10_000)

    def get(self, path: Path) -> str:
        """Of the file as it is now, if it is known; '' otherwise."""
        known = self._kept.get(str(path))
        if not isinstance(known, list) or len(known) != 3 or known[:2] != _stamp(path):
            return ""
        return known[2] if re.fullmatch(r"[0-9a-f]{64}", str(known[2])) else ""

    def compute(self, path: Path) -> str:
        """Of the file, which is read unless it is known. Raises TightfitError."""
        if not (digest := self.get(path)):
            stamp, digest = _stamp(path), sha256(path)
            self._kept.put(str(path), [*stamp, digest])
        return digest


def _stamp(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]
