"""Options of a command, derived from the fields of dataclasses, where each is described once."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, make_dataclass
from functools import cache, wraps
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..adapters import ADAPTERS, Kind
from ..conditions import CONDITIONS
from ..conditions.handed import placed
from ..errors import TightfitError
from ..fields import About, described, kinds, option
from ..machine.hardware import Hardware
from ..models.hub import located
from ..models.layouts.library import ENVIRONMENT
from ..planner.wishes import Wishes
from ..request import Request
from ..units import parse_bytes

Command = Callable[..., None]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cuda, xpu, mps, cpu.", metavar="NAME", show_default=False, rich_help_panel="Machine"
    ),
]


def _looked_through(given: list[Path] | None) -> list[Path] | None:
    """The folders are the user's for this command: a file's other networks may be there, too."""
    if given:
        known = os.environ.get(ENVIRONMENT)
        os.environ[ENVIRONMENT] = os.pathsep.join((*map(str, given), *([known] if known else [])))
    return given


ModelsDirs = Annotated[
    list[Path] | None,
    typer.Option(
        "--models-dir",
        callback=_looked_through,
        help="Where models are; repeatable.",
        metavar="DIR",
        show_default=False,
        readable=False,
        rich_help_panel="Model",
    ),
]
NO_TEXT_CACHE = typer.Option("--no-text-cache", help="Encode anew, keep nothing.", rich_help_panel="Machine")
WILDCARDS = typer.Option(
    help="Of files for __name__.", metavar="DIR", readable=False, rich_help_panel="Words"
)
MODEL = typer.Option(
    help="emoji (default), file, folder, name, hub id.",
    metavar="MODEL",
    show_default=False,
    rich_help_panel="Model",
)

HARDWARE = typer.Option(
    help="A card that is not here: rtx-2060.", metavar="NAME", show_default=False, rich_help_panel="Machine"
)


def machine_of(device: str, hardware: str | None) -> Hardware:
    """The machine here, or one of profiles/. Raises TightfitError."""
    from ..machine.profiles import profile

    if hardware and device != "auto":
        said = "--hardware names a machine that is not here, --device a part of this one"
        raise TightfitError(f"{said}: give one of them")
    return profile(hardware) if hardware else Hardware.detect(device)


ADAPTERS_IN_ORDER = " ".join(kind.option for kind in ADAPTERS)


def adapting(kinds: Sequence[Kind]) -> type:
    """A dataclass of what is given of adapters: an option for each kind, which may be repeated."""
    fields = [
        (kind.option, list[str] | None, option(None, kind.help, kind.metavar, panel="Model"))
        for kind in kinds
    ]
    return make_dataclass("Adapting", fields)


Adapting = adapting(ADAPTERS)


Asking = make_dataclass(
    "Asking",
    [
        (field.name, kinds(kind.options)[field.name] | None, field)
        for kind in CONDITIONS
        if kind.options
        for field in dataclasses.fields(kind.options)
    ],
    namespace={"__doc__": "What is given of conditions."},
)
SECOND_PASS = " ".join(name for name in described(Request) if name.startswith(("hires", "refiner")))
ASKING_IN_ORDER = " ".join(name for name, known in described(Asking).items() if known.help)


@cache
def _spelled() -> dict[str, str]:
    """Options of two words or more by the names of their fields."""
    every = {name: known for group in (Request, Asking, Wishes) for name, known in described(group).items()}
    return {
        name: next(iter(known.options), f"--{name.replace('_', '-')}")
        for name, known in every.items()
        if known.help and "_" in name
    }


def as_typed(message: str) -> str:
    """A message of the runtime, with options as they are typed in place of Python's names."""
    names = "|".join(sorted(_spelled(), key=len, reverse=True))
    word = rf"(?<![\w./\\'\"-])({names})(?![\w/\\'\"=-]|\.\w)"
    return re.sub(word, lambda match: _spelled()[match[1]], message)


def taking(own: type, *groups: type, order: str = "...") -> Callable[[Command], Command]:
    """Make a typer command of a function that takes an `own`, and of each group a mapping of what was typed.

    Options are all fields of `own`, annotated in typer's words, and the fields of `groups` that have a help.
    --help lists them in `order`, by their names. "..." stands for those that it does not name.
    """
    derived = {name: parameter for group in groups for name, parameter in _derived(group).items()}
    parameters = _ordered(derived | _written(own), order.split())

    def decorate(function: Command) -> Command:
        @wraps(function)
        def command(**values: Any) -> None:
            options = own(**{field.name: values[field.name] for field in dataclasses.fields(own)})
            function(options, *(_typed(group, values) for group in groups))

        command.__annotations__ = {}
        command.__signature__ = Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
        return command

    return decorate


def _written(own: type) -> dict[str, Parameter]:
    hints = get_type_hints(own, include_extras=True)
    defaults = {field.name: field.default for field in dataclasses.fields(own)}
    return {
        name: _parameter(name, hints[name], Parameter.empty if default is MISSING else default)
        for name, default in defaults.items()
    }


def _derived(group: type) -> dict[str, Parameter]:
    types = kinds(group)
    return {
        name: _parameter(name, Annotated[types[name] | None, _option(known)], None)
        for name, known in described(group).items()
        if known.help
    }


def _option(known: About) -> Any:
    return typer.Option(
        *known.options, help=known.help, metavar=known.metavar or None, rich_help_panel=known.panel
    )


def _parameter(name: str, annotation: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _ordered(parameters: Mapping[str, Parameter], order: list[str]) -> list[Parameter]:
    others = [name for name in parameters if name not in order]
    names = [name for word in order for name in (others if word == "..." else [word])]
    return [parameters[name] for name in names]


def _typed(group: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `group` that were typed: the others are for whoever makes one of them to decide."""
    return {name: values[name] for name in described(group) if values.get(name) is not None}


def with_paths(asked: Mapping[str, Any], models_dirs: Sequence[Path]) -> dict[str, Any]:
    """What is asked of a request, with the paths of refiner and upscaler in place of their names."""
    places = {"refiner": located, "hires_upscaler": placed}
    return {
        name: places[name](value, models_dirs) if name in places and value else value
        for name, value in asked.items()
    }


def row_of(
    adapting: Mapping[str, Any], asked: Mapping[str, Any], wished: Mapping[str, Any], own: Any
) -> dict[str, Any]:
    """What was typed as a row of a table: adapters, what is asked, ways to run, and the model and models_dirs
    of a command's `own` options. What one plan has for all rows is left out."""
    given = {name: texts for name, texts in adapting.items() if texts}
    ways = {name: value for name, value in wished.items() if name not in ("budget", "images_per_call")}
    model = {} if own.model is None else {"model": own.model}
    return {**with_paths(asked, own.models_dirs or ()), **given, **ways, **model}


def wishes(typed: Mapping[str, Any], precision: str | None = None) -> dict[str, Any]:
    """Fields of Wishes. `precision` is for where none was typed.

    One run of the command needs each component once, so loading is counted for each.
    """
    fields = {**typed, "precision": typed.get("precision") or precision or "auto", "requests": 1}
    if "budget" in fields:
        fields["budget"] = parse_bytes(fields["budget"], "--vram or --ram")
    Wishes(**fields)  # raises here, before what takes time is imported
    return fields
