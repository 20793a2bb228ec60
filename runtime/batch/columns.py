"""What a row of a table may say, and what its texts mean: fields of requests, conditions and wishes, by their
own names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache, lru_cache
from types import MappingProxyType
from typing import Any, get_origin

from .. import spelling
from ..adapters import ADAPTERS
from ..asking import names
from ..conditions import CONDITIONS
from ..errors import TightfitError
from ..fields import described, kinds
from ..files import shortened
from ..open_models import ASKABLE
from ..request import Request

MODEL, NAME = OWN = ("model", "name")
"""Columns besides those of requests and wishes: which model paints, and what the picture's file is called."""
_SPAN = re.compile(r"\s*(-?\d{1,19})\s*\.\.\s*(-?\d{1,19})\s*(?:\.\.\s*(\d{1,19})\s*)?")
_TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_MOST_SPAN = 10_000_000


@cache
def types() -> dict[str, Any]:
    """The type of each column; of what is a list of its own, list."""
    known: dict[str, Any] = dict.fromkeys(OWN, str) | {**kinds(Request), **ASKABLE}
    for kind in CONDITIONS:
        for name, about in described(kind.options).items() if kind.options else ():
            each = kinds(kind.options)[name] if kind.options else str
            known[name] = list if get_origin(each) is list or not about.help else each
    known |= {kind.option: list for kind in ADAPTERS}
    return {name: known[name] for name in (*OWN, *names(), *ASKABLE) if name not in _IN_PYTHON}


_IN_PYTHON = "adapters", "conditions", "preview_every", "models_dirs"


@cache
def _spelled() -> dict[str, str]:
    """Columns by the names of their options: steps is num_inference_steps."""
    groups = [Request, *(kind.options for kind in CONDITIONS if kind.options)]
    spelled = {
        option.removeprefix("--").replace("-", "_"): name
        for group in groups
        for name, about in described(group).items()
        for option in about.options
    }
    return spelled | {name: name for name in types()}


@lru_cache(1024)
def column(name: str) -> str:
    """The column that is called so. Raises TightfitError, which says what was meant."""
    plain = name.strip().lower().replace("-", "_").removeprefix("__")
    if plain in _spelled():
        return _spelled()[plain]
    said = spelling.meant(plain, [*_spelled()], spelling.OF_REQUESTS)
    known = said or "docs/batch.md lists the columns"
    raise TightfitError(f"unknown column {shortened(name)}: {known}")


def read(name: str, text: str) -> Any:
    """What a text, as in a CSV, means in that column: a number, a truth, a text or a list; None for none.
    Raises TightfitError."""
    kind, bare = types()[name], text.strip()
    if not bare:
        return text if name == "prompt" and text else None
    if bare.startswith("[") and (kind is list or kind is not str):
        return _listed(name, bare)
    if kind is list:
        return [bare]
    if kind is int:
        return _whole(name, bare)
    if kind is float:
        return _number(name, bare)
    if kind is bool:
        if bare.lower() not in _TRUTHS:
            raise TightfitError(f"{name} must be true or false, not {shortened(bare)}")
        return _TRUTHS[bare.lower()]
    return text if name == "prompt" else bare


def _listed(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise TightfitError(f"{name} {shortened(text)} is no JSON list: close it, and quote texts") from None


def _whole(name: str, text: str) -> Any:
    if _SPAN.fullmatch(text):
        return text
    try:
        return int(text)
    except ValueError:
        said = f"{name} must be a whole number, or a span such as 1..20, not {shortened(text)}"
        raise TightfitError(said) from None


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        cure = "; write 7.5, with a point" if re.fullmatch(r"\d+,\d+", text) else ""
        raise TightfitError(f"{name} must be a number, not {shortened(text)}{cure}") from None


def choices(name: str, value: Any) -> range | list[Any]:
    """The values that one stands for: of a list each, of "1..20" each whole number. A column whose values are
    lists of their own, such as lora, has lists of lists. Raises TightfitError."""
    kind = types()[name]
    if isinstance(value, str) and kind is int and (span := _SPAN.fullmatch(value)):
        first, last, step = int(span[1]), int(span[2]), int(span[3] or 1)
        if last < first or not step or (last - first) // step > _MOST_SPAN:
            raise TightfitError(f"{name} {shortened(value)} is no span: write 1..20, or 0..100..10 for tens")
        return range(first, last + 1, step)
    if not isinstance(value, list):
        return [value]
    if kind is list and not any(isinstance(one, list) for one in value):
        return [value]
    if not value:
        raise TightfitError(f"{name} is an empty list: leave it out, or name a value")
    if kind is list:
        return value
    if any(isinstance(one, list) for one in value):
        raise TightfitError(f"{name} has a list in a list: write its values in one list")
    return [one for each in value for one in choices(name, each)]


class Named(dict[str, Any]):
    """A row by its columns' own names. typed: what was typed for those that have another."""

    typed: Mapping[str, str] = MappingProxyType({})


def renamed(row: Mapping[Any, Any]) -> Named:
    """A row by its columns' own names, without what is left out. Raises TightfitError."""
    given = Named()
    for name, value in row.items():
        if (known := column(str(name))) in given:
            raise TightfitError(f"{known} is given twice, also as {shortened(name)}: leave one out")
        if value is not None:
            given[known] = value
    given.typed = typed({column(str(name)): str(name) for name in row})
    return given


def typed(names: Mapping[str, str]) -> dict[str, str]:
    """Of what was typed for columns, what differs from their own names."""
    return {known: name.strip() for known, name in names.items() if name.strip() != known}


def as_typed(error: TightfitError, names: Mapping[str, str]) -> str:
    """What is wrong, in the words of the table's own columns."""
    said = str(error)
    for known, name in names.items():
        said = re.sub(rf"(?<!\w){re.escape(known)}(?!\w)", lambda _, name=name: name, said)
    return said
