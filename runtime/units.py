"""Bytes as people write and read them."""

from __future__ import annotations

import re

from .errors import TightfitError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


_UNITS |= {
    unit: 2**bits
    for bits, units in ((10, ("k", "kib")), (20, ("m", "mib")), (30, ("g", "gib")))
    for unit in units
}


def parse_bytes(text: str | float, option: str) -> int:
    """Bytes from '4GiB', '3.5GB', '800 MiB' or a plain number, which must be a million at least, since nobody
    means 8 bytes. Raises TightfitError naming `option`."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", str(text).lower())
    if (
        not match
        or match[2] not in _UNITS
        or float(match[1]) == 0
        or (match[2] and float(match[1]) * _UNITS[match[2]] < 1)
    ):
        raise TightfitError(f"{option} must be an amount such as 4GiB or 3500MB, not {str(text)!r}")
    count = int(float(match[1]) * _UNITS[match[2]])
    if not match[2] and count < 2**20:
        raise TightfitError(
            f"{option} is {match[1]} bytes: did you mean {match[1]}{'GiB' if count < 1000 else 'MiB'}?"
        )
    return count


def shown(count: float) -> str:
    """Bytes for people: '212 MiB', '3.65 GiB'."""
    if count < 2**15:
        return f"{count:.0f} bytes"
    mebibytes = count / 2**20
    return (
        f"{mebibytes / 1024:.2f} GiB"
        if mebibytes >= 1000
        else f"{mebibytes:.0f} MiB"
        if mebibytes >= 10
        else f"{mebibytes:.1f} MiB"
    )
