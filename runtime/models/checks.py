"""Checks of a config's fields before a library reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import TightfitError

MOST_LEVELS = 100_000  # noise levels of a scheduler; SD has 1000
MOST_WIDTH = 2**20
# Limits before anything is built, far beyond any model of these families.
MOST_LAYERS, MOST_BLOCKS, MOST_ALL = 512, 16, 4096
LEAST_TENSORS = 6  # in a layer: a residual block without a shortcut has 8, a text encoder's layer 16
Check = Callable[[Any], bool]


def whole(least: int, most: int) -> Check:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any) -> bool:
    # Neither NaN nor infinite.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 <= value <= 1e9


def is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def is_truth(value: Any) -> bool:
    return isinstance(value, bool)


def is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 100


def many(check: Check, most: int = MOST_BLOCKS) -> Check:
    return lambda value: isinstance(value, list | tuple) and 0 < len(value) <= most and all(map(check, value))


def or_many(check: Check) -> Check:
    return lambda value: check(value) or many(check)(value)


def or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


is_count, is_layers = whole(1, MOST_WIDTH), whole(0, MOST_LAYERS)
is_size = lambda value: is_count(value) or (many(is_count, 2)(value) and len(value) == 2)  # noqa: E731


def check_fields(file: Path, config: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    for field, fits in checks.items():
        if field in config and not fits(config[field]):
            raise TightfitError(
                f"{file} has an impossible {field}, {brief(config[field])}: copy or download it again"
            )


def brief(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "an integer too long to print"
    return text if len(text) <= 60 else f"{text[:60]}..."


def largest(value: Any) -> int:
    """The largest number in a count that may be given per block, and per layer of a block."""
    return max(map(largest, value)) if isinstance(value, list | tuple) else value
