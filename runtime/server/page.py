"""The page: its files, what its controls may be, and the settings that a picture carries."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool

from .. import infotext, pictures
from .. import request as asking
from ..adapters import ADAPTERS, by_option
from ..asking import Shelves
from ..conditions import CONDITIONS
from ..conditions.controlnet import WORDS, Control
from ..conditions.handed import WAYS, way_of
from ..conditions.image import ImageToImage, edits
from ..conditions.mask import Inpainting
from ..errors import TightfitError
from ..fields import About, described, kinds
from ..models import schedulers
from ..models.families import known_by
from ..models.hub import BESIDE, inspect
from ..models.layouts.library import Kind
from ..models.samplers.names import AUTOMATIC, SAMPLERS, SCHEDULES, split
from ..models.spec import ModelSpec
from ..planner.wishes import Wishes
from .served import Served

router = APIRouter(include_in_schema=False)

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_WORDS = {int: "integer", float: "number", bool: "boolean", str: "text"}
_FILES = {"refiner": Kind.MODEL, "hires_upscaler": Kind.UPSCALER}
_OWN = "the picture"  # as errors and notices call what was dropped on the page
_AT_WILL = {"cache-control": "no-cache"}  # asked for again each time, and answered in a few bytes


# ------------------------------------------------------------------------------------------ files


@cache
def _pages() -> Mapping[str, tuple[bytes, str, str]]:
    """Content, type and ETag of each file by its name. Read once, so no path is made of a request."""
    found = {}
    for file in files(__package__ or "").joinpath("page").iterdir():
        kind = _TYPES.get(PurePath(file.name).suffix)
        if kind:
            content = file.read_bytes()
            digest = hashlib.sha256(content).hexdigest()[:20]
            found[file.name] = content, f"{kind}; charset=utf-8", f'"{digest}"'
    return found


def _file(name: str, request: Request) -> Response:
    page = _pages().get(name)
    if page is None:
        raise HTTPException(404, "there is no such file of the page")
    content, kind, tag = page
    headers = {**_AT_WILL, "etag": tag, "x-content-type-options": "nosniff"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=kind, headers=headers)


@router.get("/")
def index(request: Request) -> Response:
    return _file("index.html", request)


@router.get("/page/{name}")
def file(name: str, request: Request) -> Response:
    return _file(name, request)


# ------------------------------------------------------------------------------------------ controls


@router.get("/page/api/controls")
def controls() -> dict[str, Any]:
    """All that may be asked, as fields.py has it, and names of samplers, schedules and ways to enlarge."""
    options = [kind.options for kind in CONDITIONS if kind.options]
    return {
        "options": [one for group in (asking.Request, *options) for one in _controls(group)],
        "wishes": _controls(Wishes),
        "samplers": [{"name": s.name, "label": s.a1111, "schedules": s.schedules} for s in SAMPLERS.values()],
        "schedules": [{"name": s.name, "label": s.a1111} for s in SCHEDULES.values()],
        "upscalers": [{"name": name, "label": way.a1111} for name, way in WAYS.items()],
        "masked": {"strength": Inpainting.strength},  # the default then
    }


def _controls(group: type) -> list[dict[str, Any]]:
    types = kinds(group)
    defaults = {field.name: field.default for field in dataclasses.fields(group)}
    defaults |= {name: value for name, value in _of_conditions().items() if defaults.get(name, "") is None}
    return [
        _control(name, about, types[name], defaults[name])
        for name, about in described(group).items()
        if about != About()
    ]


@cache
def _of_conditions() -> dict[str, Any]:
    """What stands for options of conditions that are not given."""
    of = {kind: {f.name: f.default for f in dataclasses.fields(kind)} for kind in (Inpainting, Control)}
    painting = {"strength": ImageToImage.strength, "resize": ImageToImage.resize}
    masks = {f"mask_{name}": of[Inpainting][name] for name in ("blur", "content")}
    return painting | masks | {word: of[Control][name] for word, name in WORDS.items()}


def _control(name: str, about: About, kind: type, default: Any) -> dict[str, Any]:
    least, most = about.bounds or (None, None)
    return {
        "name": name,
        "help": about.help,
        "kind": _WORDS.get(kind, "text"),
        "least": least,
        "most": most,
        "choices": about.choices,
        "default": default,
        "panel": about.panel,
        "costs": about.costs,
    }


@router.get("/page/api/model")
def model(name: str, service: Served) -> dict[str, Any]:
    """What a model takes where nothing is said."""
    try:
        path = service.shelves.path(name, Kind.MODEL) if service.shelves else name
        return _model(inspect(path, local_files_only=True))
    except TightfitError as error:
        raise HTTPException(404, str(error)) from None


def _model(spec: ModelSpec) -> dict[str, Any]:
    height, width = spec.some_size
    scheduler = None
    with suppress(TightfitError):  # of a class that does not run here: another must be named
        scheduler = schedulers.default(spec)
    return {
        "family": known_by(spec.text_width) and spec.design.title,
        "width": width,
        "height": height,
        "multiple": spec.latents.multiple,
        "num_inference_steps": spec.default_steps,
        "guidance_scale": spec.default_guidance,
        "scheduler": scheduler,
        "edits": edits(spec),
    }


# ------------------------------------------------------------------------------------------ settings


@router.post("/page/api/settings")
async def settings(request: Request, service: Served) -> dict[str, Any]:
    """What the picture in the body says of how it was made, as options by their names; models by the names
    that they have here."""
    content = await request.body()
    try:
        return await run_in_threadpool(settings_in, content, service.shelves)
    except TightfitError as error:
        raise HTTPException(422, str(error)) from None


def settings_in(content: bytes, shelves: Shelves | None) -> dict[str, Any]:
    """Options, model, precision and notices of a picture's file. No path that it says is opened. Raises
    TightfitError for one that says nothing that is known."""
    texts = pictures.texts_inside(content, _OWN)
    named = _named(texts.get(pictures.PARAMETERS, ""))
    # Ours names adapters by their paths, which are not read here: any picture may say any path.
    given = [kind.option for kind in ADAPTERS] if named is not None else []
    carried = infotext.read_texts(texts, _OWN, given, shelves.roots if shelves else ())
    request = {name: value for name, value in carried.request.items() if value is not None}
    named = by_option(request.pop("adapters", ())) if named is None else named
    notices = [*carried.notices]
    finder = _Names(shelves or Shelves(), notices)
    options = request | {
        name: way_of(request[name]) or finder.name(request[name], shelf)
        for name, shelf in _FILES.items()
        if request.get(name)
    }
    options |= finder.adapters(named)
    if name := options.get("scheduler"):  # with the schedule as its ending
        with suppress(TightfitError):  # of a version that knows it
            sampler, schedule = split(name)
            options |= {"scheduler": sampler.name} | ({} if schedule == AUTOMATIC else {"schedule": schedule})
    asked = {name: value for name, value in carried.asking.items() if name not in ("control", "reference")}
    if carried.asking:
        notices.append(f"{_OWN} was painted after another, which it does not carry: give that too")
    model = carried.model and finder.name(carried.model, Kind.MODEL)
    if not model and (said := carried.model_said or carried.model):
        notices.append(f"its model {infotext.stem(said)} is not here")
    kept = {name: value for name, value in {**options, **asked}.items() if value not in (None, "", [])}
    return {"options": kept, "model": model or None, "precision": carried.precision, "notices": notices}


def _named(text: str) -> dict[str, list[str]] | None:
    """The adapters that our exact JSON at the end of a text names, by their options; None without that."""
    exact = pictures.ours(text)
    if not exact:
        return None
    try:
        fields = json.loads(json.loads(exact.partition("tightfit: ")[2]))
        said = fields.get("adapters") or {}
        return {option: [str(name) for name in names] for option, names in said.items()}
    except (ValueError, AttributeError, TypeError, RecursionError):
        return {}  # damaged: whoever reads all of it says so


@dataclasses.dataclass(frozen=True)
class _Names:
    """What files are called here that a picture names by their paths."""

    shelves: Shelves
    notices: list[str]

    def name(self, path: str, kind: Kind) -> str:
        """ "" for what is not here, of which a notice is kept."""
        name = infotext.stem(PurePath(path.replace("\\", "/")).name)
        name = next((short for short, place in BESIDE.items() if infotext.stem(place.name) == name), name)
        try:
            self.shelves.path(name, kind)
        except TightfitError:
            if kind is not Kind.MODEL:
                self.notices.append(f"its {kind.value} {name} is not here")
            return ""
        return name

    def adapters(self, named: Mapping[str, list[str]]) -> dict[str, list[str]]:
        shelves = {kind.option: kind.shelf for kind in ADAPTERS if kind.shelf}
        return {
            option: [short for text in texts if (short := self._text(text, shelf))]
            for option, texts in named.items()
            if (shelf := shelves.get(option))
        }

    def _text(self, text: str, kind: Kind) -> str:
        """NAME:0.8 of PATH:0.8."""
        name, *others = PurePath(text.replace("\\", "/")).name.split(":")
        known = self.name(name, kind)
        return ":".join([known, *others]) if known else ""
