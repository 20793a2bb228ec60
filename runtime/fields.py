"""Fields as data: what is said once, beside a field, and read by checks, command line, reports and PNG
text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints

_KEY = "about"


@dataclass(frozen=True)
class About:
    """What is known of a field besides its type and default. Without `help` it is no option.

    metavar: what stands for the value in --help. options: names on the command line, where the field's own,
    `--like-this`, is not all. bounds: the least and the most, both allowed. choices: the words it may be,
    besides "auto". costs: memory or seconds depend on it. panel: of --help. terse: a request that has its
    default is written without it, as by versions that did not know it. carried: of a condition, a picture
    carries it, as it is no picture itself. untold: no picture carries it, as none depends on it.
    """

    help: str = ""
    metavar: str = ""
    options: tuple[str, ...] = ()
    bounds: tuple[int, int] | None = None
    choices: tuple[str, ...] = ()
    costs: bool = False
    panel: str | None = None
    terse: bool = False
    carried: bool = False
    untold: bool = False


def option(default: Any, help: str = "", metavar: str = "", **others: Any) -> Any:  # noqa: A002
    """A field of a dataclass with its default, and what About says of it."""
    return dataclasses.field(default=default, metadata={_KEY: About(help, metavar, **others)})


def described(group: type) -> dict[str, About]:
    """What is known of each field of a dataclass, by its name, in the order of the fields."""
    return {field.name: field.metadata.get(_KEY, About()) for field in dataclasses.fields(group)}


def kinds(group: type) -> dict[str, type]:
    """The type of each field of a dataclass, None left out. Any is text, as a person types it."""
    hints = get_type_hints(group)
    names = {
        name: next((kind for kind in get_args(hint) if kind is not type(None)), hint)
        for name, hint in hints.items()
    }
    return {name: str if kind is Any else kind for name, kind in names.items()}


def plain(value: Any) -> Any:
    """A number as Python has it, also one of numpy's, which JSON has not; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)
