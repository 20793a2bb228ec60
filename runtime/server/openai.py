"""OpenAI's images API, as its clients call it; options of ours may stand beside its own.

quality is a share of the model's own steps (_QUALITIES). size is rounded to what the model can do, and said.
usage counts the prompt's tokens, and of pictures the pixels of their latents.
"""

from __future__ import annotations

import base64
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from PIL import Image
from starlette.concurrency import run_in_threadpool

from ..asking import several
from ..conditions.input_pictures import open_picture
from ..errors import TightfitError
from ..files import shortened
from ..jobs import Order, State
from ..models.spec import ModelSpec
from ..models.tokens import Reader
from ..request import sides_of
from ..service import Service, Ticket
from .asked import MASK, Asked, asked, body, body_of
from .failures import RefusedError, failure
from .guard import Door
from .served import Doored, Served, client_of, encoded, ended, moments

LOG = logging.getLogger("tightfit.openai")
router = APIRouter(prefix="/v1", tags=["OpenAI"])

_THEIRS = re.compile(r"(gpt-image|dall-e|chatgpt-image)[\w.-]*")  # models that clients name unasked
_QUALITIES = {  # what is said of it, and the share of steps
    "auto": ("medium", 1), "low": ("low", 0.5), "medium": ("medium", 1), "standard": ("medium", 1),
    "high": ("high", 1.5), "hd": ("high", 1.5), "xhigh": ("xhigh", 2), "max": ("max", 3),
}  # fmt: skip
_FORMATS = ("png", "jpeg", "webp")
_STRENGTHS = {"high": 0.5, "low": 0.8}  # by input_fidelity
_MOST_PARTIAL, _MOST_PICTURES = 3, 10
_TICK_SECONDS = 5
_TEXT = (str, "OpenAI's; changes nothing here.")
_FIELDS: dict[str, tuple[Any, str]] = {
    "model": (str, "Its name; OpenAI's own are the one that is served."),
    "n": (int, f"Pictures, to {_MOST_PICTURES}."),
    "size": (str, "auto, or WIDTHxHEIGHT; rounded to what the model can do."),
    "quality": (str, f"{', '.join(_QUALITIES)}: steps."),
    "response_format": (str, "b64_json or url."),
    "output_format": (str, f"{', '.join(_FORMATS)}."),
    "output_compression": (int, "Quality of jpeg and webp, to 100."),
    "background": (str, "opaque or auto."),
    "stream": (bool, "Server-sent events."),
    "partial_images": (int, f"Pictures on the way, to {_MOST_PARTIAL}."),
    "input_fidelity": (str, "high or low: how much of the picture stays."),
    "mask": (Any, "Transparent where to paint."),
    **dict.fromkeys(("user", "safety_identifier", "moderation", "style", "complexity"), _TEXT),
}
_BODY = body("ImageRequest", _FIELDS)
_SENT = body_of(_BODY)


@dataclass(frozen=True)
class Answering:
    """How a job's pictures are answered. event: what its events begin with. words, seen: tokens of the
    prompt and of the picture that was given. factor: pixels to one of its latents."""

    event: str
    door: Door
    base: str
    quality: str
    partial: int
    words: int = 0
    seen: int = 0
    factor: int = 1
    form: str = "png"
    compression: int = 100
    as_url: bool = False

    def content(self, image: Image.Image) -> str:
        """A picture in base64."""
        file = encoded(
            image.convert("RGB") if self.form != "png" else image, self.form.upper(), self.compression
        )
        return base64.b64encode(file).decode()

    def said(self, size: tuple[int, int]) -> dict[str, Any]:
        shown = f"{size[0]}x{size[1]}"
        return {"size": shown, "quality": self.quality, "background": "opaque", "output_format": self.form}

    def usage(self, images: list[Image.Image]) -> dict[str, Any]:
        made = sum(image.width * image.height // self.factor for image in images)
        return {
            "input_tokens": self.words + self.seen,
            "input_tokens_details": {"text_tokens": self.words, "image_tokens": self.seen},
            "output_tokens": made,
            "output_tokens_details": {"text_tokens": 0, "image_tokens": made},
            "total_tokens": self.words + self.seen + made,
        }


# ------------------------------------------------------------------------------------------ endpoints


@router.post("/images/generations", openapi_extra=_SENT)
async def generations(request: Request, service: Served, door: Doored) -> Response:
    """Paint a prompt."""
    return await _painted(request, service, door, "image_generation")


@router.post("/images/edits", openapi_extra=_SENT)
async def edits(request: Request, service: Served, door: Doored) -> Response:
    """Paint a picture anew: where the mask is transparent, or all of it; or, by a model that reads such, one
    that refers to pictures."""
    return await _painted(request, service, door, "image_edit", needs="image")


@router.post("/images/variations", openapi_extra=_SENT)
async def variations(request: Request, service: Served, door: Doored) -> Response:
    """Paint a picture anew, without a prompt."""
    return await _painted(request, service, door, "image_edit", needs="image", prompt="")


@router.get("/models")
def models(request: Request) -> dict[str, Any]:
    """All that can be named."""
    return {"object": "list", "data": [_model(*named) for named in _named(request)]}


@router.get("/models/{name:path}")
def model(name: str, request: Request) -> dict[str, Any]:
    if found := next((one for one in _named(request) if one[0] == name), None):
        return _model(*found)
    raise _no_model(name)


def _named(request: Request) -> Iterator[tuple[str, Any]]:
    for name, known in request.app.state.catalogue.models().items():
        if known.spec:
            yield name, known


def _model(name: str, known: Any) -> dict[str, Any]:
    changed = known.entry.path.stat().st_mtime if known.entry.path.exists() else 0
    return {"id": name, "object": "model", "created": int(changed), "owned_by": "tightfit"}


def _no_model(name: str) -> RefusedError:
    said = f"the model {shortened(name)} does not exist: GET /v1/models lists what there is"
    return RefusedError(said, 404, "model_not_found", "model")


async def _painted(
    request: Request,
    service: Service,
    door: Door,
    event: str,
    needs: str = "prompt",
    prompt: str | None = None,
) -> Response:
    given = await asked(request, _BODY, door.model)
    if prompt is not None:
        given = replace(given, options={**given.options, "prompt": prompt})
    if needs not in given.options:
        raise RefusedError(
            f"{needs} is missing: it is what to begin with", code="missing_parameter", param=needs
        )

    def queued() -> tuple[Ticket, Answering]:
        order, answering = _order(given, service, door, request, event)
        return service.queue(order), answering

    ticket, answering = await run_in_threadpool(queued)
    if given.others.get("stream"):
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        stream = _streamed(ticket, answering, request.url.path)
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
    await ended(ticket, request)
    content = await run_in_threadpool(_answer, ticket, answering)
    return Response(json.dumps(content), media_type="application/json")


# ------------------------------------------------------------------------------------------ what is asked


def _order(
    given: Asked, service: Service, door: Door, request: Request, event: str
) -> tuple[Order, Answering]:
    """Raises RefusedError for what OpenAI's clients may ask and nothing here does."""
    others, options = given.others, dict(given.options)
    name = _model_of(given.model, service, door)
    spec = service.models.spec(name)
    quality, share = _choice(others, "quality", _QUALITIES, "auto")
    if share != 1:
        options.setdefault("num_inference_steps", max(1, round(spec.default_steps * share)))
    options |= _size(others.get("size"), spec) | {"num_images": _count(others, options)}
    if images := several(options.pop("image", None)):
        options |= _given_pictures(images, options, others, spec)
    partial = others.get("partial_images") or 0
    if not 0 <= partial <= _MOST_PARTIAL:
        raise RefusedError(f"partial_images must be from 0 to {_MOST_PARTIAL}", param="partial_images")
    steps = options.get("num_inference_steps") or spec.default_steps
    every = max(1, -(-steps // (partial + 1))) if partial and others.get("stream") else 0
    order = Order(name, options, given.wishes, client=client_of(request), preview_every=every)
    answering = Answering(event, door, str(request.base_url), quality, partial)
    return order, _answering(others, given.model, _counting(answering, options, spec))


def _counting(answering: Answering, options: Mapping[str, Any], spec: ModelSpec) -> Answering:
    """With the tokens of what is asked."""
    reader = Reader(spec, spec.text_encoders[0])
    images = (one for name in ("image", "reference") for one in several(options.get(name)))
    words = len(reader.ids([str(options.get("prompt") or "")], ends=False)[0])
    factor = spec.downsampling**2
    seen = sum(image.width * image.height // factor for image in images)
    return replace(answering, words=words, seen=seen, factor=factor)


def _model_of(name: str, service: Service, door: Door) -> str:
    """The model of ours that is meant."""
    names = [name, door.model] if _THEIRS.fullmatch(name) else [name]
    for one in names:
        try:
            service.models.spec(one)
        except TightfitError:
            continue
        if one != name:
            LOG.info("%s is asked for, and %s is what is served", name, one)
        return one
    raise _no_model(name)


def _choice(others: Mapping[str, Any], name: str, known: Mapping[str, Any], default: str) -> Any:
    word = others.get(name) or default
    if word not in known:
        said = f"{name} must be one of {', '.join(known)}, not {shortened(word)}"
        raise RefusedError(said, code="invalid_value", param=name)
    return known[word]


def _count(others: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    count = others.get("n")
    if count is None:
        return options.get("num_images") or 1
    if not 1 <= count <= _MOST_PICTURES:
        raise RefusedError(f"{count} images are asked for: n must be from 1 to {_MOST_PICTURES}", param="n")
    return count


def _size(text: str | None, spec: ModelSpec) -> dict[str, int]:
    """Width and height, each rounded to the nearest that the model can do."""
    sides = None if text in (None, "auto") else sides_of("size", text)
    step = spec.latents.multiple
    rounded = [max(step, round(side / step) * step) for side in sides or ()]
    return dict(zip(("width", "height"), rounded, strict=False))


def _given_pictures(
    images: Sequence[Image.Image], options: Mapping[str, Any], others: Mapping[str, Any], spec: ModelSpec
) -> dict[str, Any]:
    """Those that a prompt refers to, of a model that reads such. Else one to begin with, and its mask as ours
    has it: white where to paint."""
    mask, is_one = others.get(MASK), len(images) == 1
    alpha = open_picture(images[0] if mask is None else mask).alpha
    fidelity = _choice(others, "input_fidelity", _STRENGTHS, "low")
    refers = spec.design.reference_pixels and options.get("prompt") and not (is_one and alpha is not None)
    if refers and mask is None and not {"mask_image", "strength"} & {*options}:
        return {"reference": [*images, *several(options.get("reference"))]}
    if not is_one:
        raise RefusedError("one picture is edited here, not several: send one image", param="image")
    begun: dict[str, Any] = {"image": images[0]}
    if mask is not None and alpha is None:
        raise RefusedError("the mask must be transparent where to paint, and this one is nowhere", param=MASK)
    if alpha is not None and "mask_image" not in options:
        return begun | {"mask_image": Image.fromarray(255 - alpha)}
    return (
        begun if "mask_image" in options else {"strength": fidelity, **begun, **_given(options, "strength")}
    )


def _given(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name: options[name]} if name in options else {}


def _answering(others: Mapping[str, Any], model: str, answering: Answering) -> Answering:
    forms = {form: form for form in _FORMATS}
    _choice(others, "background", {"auto": 0, "opaque": 0}, "auto")
    compression = others.get("output_compression")
    compression = 100 if compression is None else compression
    if not 0 <= compression <= 100:
        raise RefusedError("output_compression must be from 0 to 100", param="output_compression")
    usual = "url" if model.startswith("dall-e") and not others.get("stream") else "b64_json"
    return replace(
        answering,
        form=_choice(others, "output_format", forms, "png"),
        compression=max(1, compression),
        as_url=_choice(others, "response_format", {"url": True, "b64_json": False}, usual),
    )


# ------------------------------------------------------------------------------------------ what is answered


def _answer(ticket: Ticket, answering: Answering) -> dict[str, Any]:
    if ticket.state in (State.FAILED, State.CANCELLED, State.POSTPONED):
        ticket.result()  # raises why
    images = ticket.images
    if answering.as_url:
        data = [{"url": _url(ticket, number, answering)} for number in range(1, len(images) + 1)]
    else:
        data = [{"b64_json": answering.content(image)} for image in images]
    size = images[0].size if images else (0, 0)
    usage = answering.usage(images)
    return {"created": int(ticket.record.created), "data": data, **answering.said(size), "usage": usage}


def _url(ticket: Ticket, number: int, answering: Answering) -> str:
    if not ticket.record.pictures:
        raise RefusedError("pictures are not kept here: ask for b64_json", param="response_format")
    signed = answering.door.signed(f"/v1/tightfit/jobs/{ticket.id}/pictures/{number}")
    more = f"output_format={answering.form}&quality={answering.compression}"
    return f"{answering.base.rstrip('/')}{signed}{'&' if '?' in signed else '?'}{more}"


async def _streamed(ticket: Ticket, answering: Answering, path: str) -> AsyncIterator[str]:
    """Each picture as it is painted, and pictures on the way to it. A client that goes away cancels it."""
    sent, index = 0, 0
    shown: Image.Image | None = None
    try:
        async for _ in moments(ticket, _TICK_SECONDS):
            preview, images = ticket.preview, ticket.images
            is_new = (
                preview is not None and preview is not shown and not any(preview is one for one in images)
            )
            if is_new and preview and index < answering.partial:
                shown, index = preview, index + 1
                about = {"partial_image_index": index - 1}
                yield await run_in_threadpool(_event, "partial_image", ticket, answering, preview, about)
            for image in images[sent:]:
                sent, index = sent + 1, 0
                usage = answering.usage([image])
                yield await run_in_threadpool(_event, "completed", ticket, answering, image, {"usage": usage})
        if ticket.state in (State.FAILED, State.CANCELLED, State.POSTPONED):
            yield await run_in_threadpool(_failed, ticket, path)
    finally:
        if not ticket.state.is_end:
            ticket.cancel()


def _event(
    kind: str, ticket: Ticket, answering: Answering, image: Image.Image, about: Mapping[str, Any]
) -> str:
    name = f"{answering.event}.{kind}"
    told = {"type": name, "b64_json": answering.content(image), "created_at": int(ticket.record.created)}
    return f"event: {name}\ndata: {json.dumps({**told, **answering.said(image.size), **about})}\n\n"


def _failed(ticket: Ticket, path: str) -> str:
    try:
        ticket.result()
    except Exception as error:
        return f"event: error\ndata: {json.dumps(failure(path, error)[1])}\n\n"
    return ""
