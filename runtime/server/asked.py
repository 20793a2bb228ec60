"""What a client of our own API asks: read from JSON or a form, its schema made of the fields of requests."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

from annotated_types import Len
from fastapi import Request as HttpRequest
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from .. import asking, spelling
from ..adapters import ADAPTERS
from ..conditions import CONDITIONS
from ..conditions.input_pictures import decoded
from ..errors import TightfitError
from ..fields import About, described, kinds
from ..files import parsed, shortened
from ..jobs import DOES, Order
from ..planner.wishes import Wishes
from ..request import RANDOM_SEED, Request
from .failures import RefusedError, in_one_line
from .guard import release
from .served import picture_of

JSON, FORM = "application/json", "multipart/form-data"
_NOT_TAKEN = ("adapters", "conditions", "control", "models_dirs")  # objects, or paths of the host
MASK = "mask"  # OpenAI's, which is transparent where to paint
PICTURES = (*asking.PICTURES, MASK)
_PICTURE = "A picture: its file in base64, also as a data URL; in a form, the file itself."
_IN_DIFFUSERS_WORDS = "As diffusers calls it; may be a list."
_EXAMPLES: dict[str, Any] = {
    "model": "emoji", "prompt": "a red heart", "seed": 7, "scheduler": "Euler a", "lora": ["flat:0.8"],
    "budget": "4GiB", "hires_size": "1024x1024", "hardware": "rtx-2060",
}  # fmt: skip
# What is asked besides options and wishes.
_OF_JOBS: dict[str, tuple[Any, str]] = {
    "model": (str, "Its name; default: the one that is served."),
    "does": (str, "paint, or upscale: the model is an upscaler then, and image and scale are its options."),
    "scale": (float, "Of upscale: how many times as large."),
    "priority": (int, "Of your own jobs what has more goes first."),
    "preview_every": (int, "Steps from one preview to the next; 0: none."),
}
_OF_PLANS: dict[str, tuple[Any, str]] = {
    "model": _OF_JOBS["model"],
    "hardware": (str, "A card that is not here."),
}
_MOST = 1000  # of priorities and steps of previews
_MOST_PICTURES, _MOST_ITEMS = 8, 100  # of a field
_TEXTS = Annotated[list[str], Len(max_length=_MOST_ITEMS)] | str
_THEIRS = {
    name: said
    for name, said in {**spelling.OF_MODELS, **spelling.OF_REQUESTS}.items()
    if said.startswith("it is ")
}


@dataclass(frozen=True)
class Asked:
    """What a client has asked: the model, options, wishes, and what is neither."""

    model: str
    options: Mapping[str, Any]
    wishes: Mapping[str, Any]
    others: Mapping[str, Any]

    def order(self, client: str) -> Order:
        """Raises TightfitError for a number that no order has."""
        numbers = {name: self.others.get(name) or 0 for name in ("priority", "preview_every")}
        for name, least in (("priority", -_MOST), ("preview_every", 0)):
            if isinstance(numbers[name], bool) or not least <= numbers[name] <= _MOST:
                raise TightfitError(f"{name} must be from {least} to {_MOST}, not {numbers[name]}")
        does = self.others.get("does") or "paint"
        if does not in DOES:
            raise TightfitError(f"does must be {' or '.join(DOES)}, not {shortened(does)}")
        options = self.options
        if does == "upscale":
            options = {"image": options.get("image"), "scale": self.others.get("scale")}
        priority, every = numbers["priority"], numbers["preview_every"]
        return Order(self.model, options, self.wishes, does, client, priority, every)


def _known() -> Iterator[tuple[str, Any, About, Any]]:
    """Name, type, what is known of it, and default of every option and wish that a client may give."""
    for group in (Request, *(kind.options for kind in CONDITIONS if kind.options), Wishes):
        types, abouts, hints = kinds(group), described(group), get_type_hints(group)
        for field in dataclasses.fields(group):
            about, is_text = abouts[field.name], field.name == "prompt"
            is_known = bool(about.help or about.choices)
            if field.name not in _NOT_TAKEN and (is_known or group is not Wishes):
                kind = types[field.name] if is_known or is_text else Any
                kind = kind | float if about.help and hints[field.name] is Any else kind  # bytes, as text too
                yield field.name, kind, about, None if is_text else field.default
    for adapter in ADAPTERS:
        if adapter.shelf or adapter.metavar != "FILE":  # a name, not a path
            yield adapter.option, _TEXTS, About(adapter.help, adapter.metavar), None


def _field(name: str, kind: Any, about: About, default: Any) -> tuple[Any, Any]:
    """As pydantic has it. Bounds and choices are told here, and checked where the command line's are."""
    told: dict[str, Any] = {} if default is None else {"default": default}
    if about.bounds:
        least, most = about.bounds
        told |= {"minimum": RANDOM_SEED if name.endswith("seed") else least, "maximum": most}
    text = about.help or ("" if about.choices else _IN_DIFFUSERS_WORDS)
    if name in PICTURES:
        kind, text, told = Any, _PICTURE, {"type": "string", "contentEncoding": "base64"}
    if about.choices:
        text = f"{text} One of {', '.join(about.choices)}.".strip()
    return _described(name, kind, text, told)


def _described(name: str, kind: Any, text: str, told: Mapping[str, Any]) -> tuple[Any, Any]:
    examples = [_EXAMPLES[name]] if name in _EXAMPLES else None
    field = Field(None, description=text, examples=examples, json_schema_extra=dict(told))
    return (kind if kind is Any else kind | None), field


def body(title: str, others: Mapping[str, tuple[Any, str]]) -> type[BaseModel]:
    """The schema of a body that has all options and wishes, and `others`: a type and a help of each."""
    fields = {name: _described(name, kind, text, {}) for name, (kind, text) in others.items()}
    for known in _known():
        fields.setdefault(known[0], _field(*known))
    return create_model(title, __config__=ConfigDict(extra="forbid"), **fields)  # pyright: ignore[reportCallIssue, reportArgumentType]


JOB, PLAN = body("Job", _OF_JOBS), body("Plan", _OF_PLANS)


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says of a body that `asked` reads."""
    schema = model.model_json_schema()
    example = {"model": "emoji", "prompt": "a red heart", "seed": 7}
    content = {JSON: {"schema": schema, "example": example}, FORM: {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


async def asked(request: HttpRequest, model: type[BaseModel], default: str) -> Asked:
    """What is in the request's body. Raises TightfitError in one line."""
    kind = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
    most_pixels = request.app.state.service.limits.pixels
    if kind == FORM:
        form = await _of_form(request, model)
        given = await run_in_threadpool(_checked, form, model, default, most_pixels)
    elif kind == JSON:  # by its stream, as the request keeps what body() reads for as long as it waits
        content = b"".join([part async for part in request.stream()])
        given = await run_in_threadpool(lambda: _checked(_of_json(content), model, default, most_pixels))
    else:
        raise RefusedError(f"a body is {JSON} or {FORM}, not {shortened(kind)}", 415)
    release(request.scope)
    return given


def _of_json(content: bytes) -> dict[str, Any]:
    try:
        values = parsed(content)
    except (ValueError, UnicodeError) as error:
        raise TightfitError(f"the body is not valid JSON ({error}): send one object") from None
    if not isinstance(values, dict):
        raise TightfitError("the body must be one JSON object")
    return values


async def _of_form(request: HttpRequest, model: type[BaseModel]) -> dict[str, Any]:
    """Texts, lists of them where there are several, and the contents of files. What is empty is not given."""
    values: dict[str, Any] = {}
    async with request.form(max_files=50, max_fields=500) as form:
        for key in form:
            given = [await one.read() if isinstance(one, UploadFile) else one for one in form.getlist(key)]
            full = [one for one in given if one or key == "prompt"]
            if not full:
                continue
            name = key.removesuffix("[]")  # as OpenAI's client names one of several
            is_list = len(full) > 1 or _takes_list(model, name)
            values[name] = [*map(_plain, full)] if is_list else _plain(full[0], as_text=name in _texts(model))
    return values


def _takes_list(model: type[BaseModel], name: str) -> bool:
    field = model.model_fields.get(name)
    return field is not None and field.annotation == _TEXTS | None


def _texts(model: type[BaseModel]) -> set[str]:
    return {name for name, field in model.model_fields.items() if field.annotation is not Any}


def _plain(value: Any, as_text: bool = False) -> Any:
    """A number, or a truth, of its text, where it may be anything."""
    if isinstance(value, str) and not as_text:
        try:
            number = json.loads(value)
        except ValueError:
            return value
        return number if isinstance(number, int | float) else value
    return value


def _checked(values: Mapping[str, Any], model: type[BaseModel], default: str, most_pixels: int) -> Asked:
    known = model.model_fields
    if unknown := next((name for name in values if name not in known), None):
        theirs = {name: said for name, said in _THEIRS.items() if said.split()[2].strip(",:") in known}
        meant = spelling.meant(unknown, known, theirs) or "/openapi.json lists what there is"
        said = f"unknown option {shortened(unknown)}: {meant}"
        raise RefusedError(said, code="unknown_parameter", param=unknown[:100])
    for name, value in values.items():  # before any of them is decoded
        most = _MOST_PICTURES if name in PICTURES else _MOST_ITEMS
        if isinstance(value, list) and len(value) > most:
            raise RefusedError(
                f"{name} has {len(value)} items, where {most} are taken: give fewer", param=name
            )
    pictures = {
        name: _pictures(values[name], name, most_pixels) for name in PICTURES if values.get(name) is not None
    }
    try:
        read = model.model_validate({**values, **pictures})
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        raise TightfitError(in_one_line(errors)) from None
    given = {name: getattr(read, name) for name in read.model_fields_set}
    given |= {
        name: value for name, value in values.items() if isinstance(value, bool)
    }  # it makes them numbers
    given = {name: value for name, value in given.items() if value is not None}
    wishes = {name: given.pop(name) for name in described(Wishes) if name in given}
    options = {name: given.pop(name) for name in asking.names() if name in given}
    return Asked(given.pop("model", None) or default, options, wishes, given)


def _pictures(value: Any, name: str, most_pixels: int) -> Any:
    def picture(one: Any) -> Image.Image:
        read = decoded if isinstance(one, bytes) else picture_of
        return read(one, name, most_pixels)

    return [*map(picture, value)] if isinstance(value, list) else picture(value)
