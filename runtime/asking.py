"""Options by their names, as Python, a queue or HTTP give them, become a request."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, SupportsIndex

from . import conditions, spelling
from .adapters import ADAPTERS, written
from .adapters.prompt import from_words
from .conditions.handed import way_of
from .errors import TightfitError
from .files import shortened
from .models.hub import BESIDE, BUILT_IN
from .models.layouts import library
from .models.layouts.library import Entry, Kind
from .models.spec import ModelSpec
from .request import RANDOM_SEED, Request, drawn

REFRESH_SECONDS = 2.0
PICTURES = ("image", "mask_image", "control_image", "ip_adapter_image", "reference")
"""Options that are pictures, or lists of them."""
_PATHS = ("control",)  # a text that begins with the path of a picture
_NAMED = {"refiner": Kind.MODEL, "hires_upscaler": Kind.UPSCALER, "controlnet": Kind.CONTROLNET}
_FIELDS = tuple(field.name for field in dataclasses.fields(Request) if field.name != "conditions")


class Shelves:
    """What a client may name: what is built in, and what lies in folders of models. Never a path, so a name
    opens nothing else.

    The folders are looked through once, by `refresh`, and for a name that is not known; for these every
    REFRESH_SECONDS at most, as a client may ask for any number of them. Safe to use from threads.
    """

    def __init__(
        self, models_dirs: Sequence[str | Path] = (), models: Mapping[str, str] | None = None
    ) -> None:
        """Of these folders, those of TIGHTFIT_MODELS and of the config file; `models` elsewhere by their
        names. Raises TightfitError for one that is none."""
        self.roots, self.models = library.folders(models_dirs), dict(models or {})
        self._refreshed = -math.inf
        self.refresh()

    def refresh(self) -> None:
        """Look through the folders again."""
        self.library, self._places = library.scan(self.roots), {}

    def named(self) -> list[tuple[str, Entry]]:
        """What has a name of its own, and lies in no folder of models: what ships, and `models`."""
        places = {**BUILT_IN, **{name: Path(place) for name, place in self.models.items()}}
        whole = [(name, Entry(path, path.parent, Kind.MODEL)) for name, path in places.items()]
        return whole + [(name, Entry(path, path.parent, None)) for name, path in BESIDE.items()]

    def path(self, name: str, kind: Kind) -> str:
        """Of what is called so; of a built-in model its name. Raises TightfitError for what is not there."""
        if not isinstance(name, str):
            raise TightfitError(f"a name of a {kind.value} is text, not {shortened(name)}")
        if kind is Kind.MODEL and (name in BUILT_IN or name in self.models):
            return self.models.get(name, name)
        if kind is not Kind.MODEL and name in BESIDE:
            return str(BESIDE[name])
        if place := self._place(name, kind):
            return place
        if time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self._refreshed = time.monotonic()
            self.refresh()
            if place := self._place(name, kind):
                return place
        raise library.missing_here(name, kind, self.library)

    def bare(self, text: str) -> str:
        """The text with names in place of paths, which are the host's own affair."""
        names = {str(entry.path): name for name, entry in self.named()}
        names |= {f"{root}{os.sep}": "" for root in self.roots}
        for place in sorted(names, key=len, reverse=True):
            text = text.replace(place, names[place])
        return text

    def _place(self, name: str, kind: Kind) -> str | None:
        """By its name, which is looked up among all files once."""
        places = self._places
        if (place := places.get((name, kind))) is None and (
            known := library.called(name, kind, self.library)
        ):
            place = places[name, kind] = str(known)
        return place


def names() -> tuple[str, ...]:
    """Of all options, the prompt first."""
    return (*dict.fromkeys((*_FIELDS, *conditions.options(), *(kind.option for kind in ADAPTERS))),)


def request_of(
    options: Mapping[str, Any],
    shelves: Shelves | None = None,
    models_dirs: Sequence[str | Path] = (),
    model: Callable[[], ModelSpec] | None = None,
) -> Request:
    """The request that these options ask, by the names of Request's fields, of conditions' options, and of
    adapters' (`lora`: a list of "FILE:0.8").

    With `shelves`, names are of what lies there, and pictures are PIL images: no path is opened. Without them
    names are looked for in `models_dirs`, too. Raises TightfitError for an option that there is not, and for
    whatever no model could do, or not the `model` that it is for.
    """
    known = [*names(), "conditions"]
    if unknown := [name for name in options if name not in known]:
        raise spelling.unknown(unknown[0], [name for name in known if name != "prompt"], spelling.OF_REQUESTS)
    if model:
        check_taken(model, options)
    given = dict(options if shelves is None else _shelved(options, shelves))
    roots = shelves.roots if shelves else tuple(models_dirs)
    adapting = {kind.option: _texts(given.pop(kind.option, ())) for kind in ADAPTERS}
    asking = {name: given.pop(name) for name in conditions.options() if name in given}
    prompt = given.pop("prompt", None)
    named = ()
    if isinstance(prompt, str):
        find = partial(shelves.path, kind=Kind.LORA) if shelves else None
        prompt, named = from_words(prompt, roots, find)
    adapters = *given.pop("adapters", ()), *written(adapting, roots), *named
    asked = conditions.asked({**asking, "models_dirs": roots} if asking and shelves else asking)
    every = (*given.pop("conditions", ()), *asked)
    return Request(prompt, adapters=adapters, conditions=every, **given).checked()  # pyright: ignore[reportArgumentType]


def check_taken(model: Callable[[], ModelSpec], options: Mapping[str, Any]) -> None:
    """Raise TightfitError for an adapter or a condition that is not for models of that family, whatever its
    file is: that it cannot be read would be no help. The model is read where one is given."""
    given = {name for name, value in options.items() if several(value)}
    asking = (kind.limited[0] for kind in conditions.CONDITIONS if given & {*kind.limited})
    if limited := [*(kind.option for kind in ADAPTERS if kind.option in given), *asking]:
        spec = model()
        for option in limited:
            spec.check_takes(option)


def untaken(model: Callable[[], ModelSpec], options: Collection[str]) -> list[str]:
    """Options of conditions that are not for models of that family, of those that a picture carries."""
    limited = [kind for kind in conditions.CONDITIONS if {*options} & {*kind.limited}]
    others = [kind for kind in limited if not model().design.is_taken(kind.limited[0])]
    fields = {field.name for kind in others if kind.options for field in dataclasses.fields(kind.options)}
    return [name for name in options if name in fields.union(*(kind.limited for kind in others))]


def seeded(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the seeds that they leave open, so that a job that is begun again is the same."""
    open_seeds = ("seed", "subseed") if options.get("subseed_strength") else ("seed",)
    given = {name: options.get(name) for name in open_seeds}
    left_open = [name for name, value in given.items() if value is None or _is_whole(value, RANDOM_SEED)]
    return {**options, **{name: drawn(None) for name in left_open}}


def _is_whole(value: Any, number: int) -> bool:
    return isinstance(value, SupportsIndex) and operator.index(value) == number


def _texts(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str | Path) else tuple(value or ())
    if bad := next((text for text in texts if not isinstance(text, str | Path)), None):
        raise TightfitError(f"an adapter is a text such as FILE:0.8, not {shortened(bad)}")
    return tuple(map(str, texts))


def _shelved(options: Mapping[str, Any], shelves: Shelves) -> dict[str, Any]:
    """The options with the paths of what they name. Raises TightfitError for what would open another."""
    given = dict(options)
    if path := next((name for name in (*_PATHS, "adapters", "conditions") if given.get(name)), None):
        raise TightfitError(f"{path} is not taken from a client: give control_image and controlnet, or lora")
    for name in PICTURES:
        if not all(map(_is_image, several(given.get(name)))):
            raise TightfitError(f"{name} must be a picture itself, not the name of one")
    for name, kind in _NAMED.items():
        if given.get(name) is not None:
            given[name] = _each(given[name], lambda text, kind=kind: _path(text, kind, shelves))
    for adapter in ADAPTERS:
        if given.get(adapter.option) and adapter.shelf:
            texts = _texts(given[adapter.option])
            given[adapter.option] = [
                text if text == adapter.word else _with_path(text, adapter.shelf, shelves) for text in texts
            ]
        elif given.get(adapter.option) and adapter.metavar == "FILE":
            raise TightfitError(f"{adapter.option} is not taken from a client")
    return given


def several(value: Any) -> Sequence[Any]:
    """The values of what may be one, a list, or none."""
    return value if isinstance(value, list | tuple) else () if value is None else (value,)


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, list | tuple):
        return [one if one is None else change(one) for one in value]
    return change(value)


def _is_image(value: Any) -> bool:
    from PIL import Image

    return isinstance(value, Image.Image)


def _path(name: Any, kind: Kind, shelves: Shelves) -> str:
    is_way = kind is Kind.UPSCALER and isinstance(name, str) and way_of(name)
    return name if is_way else shelves.path(name, kind)


def _with_path(text: str, kind: Kind, shelves: Shelves) -> str:
    name, *others = text.split(":")
    return ":".join([shelves.path(name, kind), *others])
