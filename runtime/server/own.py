"""Our own API, /v1/tightfit: jobs, plans, models, and what this machine is.

A job is told as `Told` has it, by each of its endpoints and by its server-sent events (`event: job`). Its
pictures are counted from 1.
"""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from PIL import Image
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from ... import __version__
from ..errors import TightfitError
from ..fields import described
from ..jobs import PICTURE, Record, State
from ..machine.hardware import Hardware
from ..machine.profiles import profile
from ..pipeline import Planned
from ..planner.choose import budget_of
from ..planner.plan import Plan
from ..request import Request as Wish
from ..service import Service, Ticket
from ..versions import installed
from .asked import JOB, PLAN, asked, body_of
from .failures import RefusedError
from .served import Doored, Served, attended, client_of, encoded, moments

router = APIRouter(prefix="/v1/tightfit", tags=["tightfit"])

Format = Literal["png", "jpeg", "webp"]
_TICK_SECONDS = 2  # from one look at a job's place and rest to the next
_ALIVE_SECONDS = 15  # a comment is sent after so long without news, so that nobody in between hangs up
_PLANNED = ("precision", "compute", "residency", "attention", "tiling", "backend")


class Told(BaseModel):
    """A job. Times are seconds since 1970. position: jobs before it, 0 while it runs, null once it has ended.
    done: the share of its steps that are taken. options: without pictures, whose names are in `given`.
    pictures: addresses. preview: a data URL, where it is asked for. summary: what is known of the run once it
    is done, among it measured bytes and seconds."""

    id: str
    state: str
    model: str
    does: str
    created: float
    started: float | None
    ended: float | None
    tries: int
    error: str
    position: int | None
    stage: str | None
    step: int
    steps: int
    image: int
    done: float
    eta_seconds: float | None
    notices: list[str]
    options: dict[str, Any]
    given: list[str]
    wishes: dict[str, Any]
    plan: dict[str, Any] | None
    pictures: list[str]
    preview: str | None
    summary: dict[str, Any]


# ------------------------------------------------------------------------------------------ jobs


@router.post("/jobs", status_code=202, response_model=Told, openapi_extra=body_of(JOB))
async def submit(request: Request, response: Response, service: Served, door: Doored) -> Told:
    """Queue a job. It is done in its turn; a client that goes away loses nothing."""
    given = await asked(request, JOB, door.model)
    order = given.order(client_of(request))
    job = await run_in_threadpool(lambda: told(service, service.queue(order)))
    response.headers["Location"] = f"{router.prefix}/jobs/{job.id}"
    return job


@router.get("/jobs")
def history(
    service: Served, limit: int = Query(50, ge=1, le=500), before: str = Query("", max_length=64)
) -> dict[str, Any]:
    """The newest first, those that wait or run among them; or those older than the job `before`."""
    records = service.records(limit, before)
    jobs = [told(service, service.ticket(record.id) or record) for record in records]
    return {"jobs": jobs, "next": records[-1].id if len(records) == limit else None}


@router.get("/jobs/{id}", response_model=Told)
def job(id: str, service: Served, previews: bool = False) -> Told:  # noqa: A002
    return told(service, _job(service, id), previews)


@router.get("/jobs/{id}/events", response_class=StreamingResponse)
def events(id: str, service: Served, previews: bool = False) -> StreamingResponse:  # noqa: A002
    """Server-sent events: the job, each time something of it has changed, until it has ended."""
    return StreamingResponse(
        _events(service, _job(service, id), previews),
        media_type="text/event-stream",
        headers={"cache-control": "no-store", "x-accel-buffering": "no"},
    )


@router.delete("/jobs/{id}", response_model=Told)
def cancel(id: str, service: Served) -> Told:  # noqa: A002
    """Cancel it: it is not begun, or ends after the step it is at. One that has ended stays as it is."""
    found = _job(service, id)
    if isinstance(found, Ticket):
        found.cancel()
    return told(service, found)


@router.post("/jobs/{id}/stop", response_model=Told)
def stop(id: str, service: Served) -> Told:  # noqa: A002
    """Cancel it, but keep the pictures that are painted."""
    found = _job(service, id)
    if isinstance(found, Ticket):
        found.stop()
    return told(service, found)


@router.get("/jobs/{id}/pictures/{number}", responses={200: {"content": {"image/png": {}}}})
def picture(
    id: str,  # noqa: A002
    number: int,
    service: Served,
    output_format: Annotated[Format, Query()] = "png",
    quality: Annotated[int, Query(ge=1, le=100)] = 90,
) -> Response:
    """The first has number 1. A PNG has its settings inside; quality is of the others."""
    found, headers = _job(service, id), {"cache-control": "private, max-age=31536000, immutable"}
    record = found.record if isinstance(found, Ticket) else found
    kept = record.pictures[number - 1] if 1 <= number <= len(record.pictures) else None
    if kept and kept.is_file():
        if output_format == "png":
            return FileResponse(kept, media_type="image/png", headers=headers)
        images = {number: Image.open(kept, formats=["PNG"])}
    else:
        images = dict(enumerate(found.images if isinstance(found, Ticket) else (), 1))
    if number not in images:
        raise RefusedError(f"job {id[:40]} has no picture {number} now", 404)
    content = encoded(images[number], output_format.upper(), quality)
    return Response(content, media_type=f"image/{output_format}", headers=headers)


def _job(service: Service, id: str) -> Ticket | Record:  # noqa: A002
    if found := service.ticket(id) or service.record(id):
        return found
    raise RefusedError(f"there is no job {id[:40]}", 404)


def told(service: Service, job: Ticket | Record, previews: bool = False) -> Told:
    """A job as JSON."""
    ticket = job if isinstance(job, Ticket) else None
    record = job.record if isinstance(job, Ticket) else job
    last, plan = (ticket.last, ticket.plan) if ticket else (None, None)
    given = [name for name, value in record.order.options.items() if _is_picture(value)]
    count = max(len(record.pictures), len(ticket.images) if ticket else 0)
    return Told(
        id=record.id,
        state=record.state.value,
        model=record.order.model,
        does=record.order.does,
        created=record.created,
        started=record.started,
        ended=record.ended,
        tries=record.tries,
        error=record.error,
        position=_position(service, record),
        stage=last.stage if last else None,
        step=last.step if last else 0,
        steps=last.steps if last else 0,
        image=last.image if last else 0,
        done=ticket.done if ticket else float(record.state.is_end),
        eta_seconds=ticket.eta_seconds if ticket else None,
        notices=[*_notices(ticket, record)],
        options={name: value for name, value in record.order.options.items() if name not in given},
        given=given,
        wishes=dict(record.order.wishes),
        plan=_brief(plan) if plan else None,
        pictures=[f"{router.prefix}/jobs/{record.id}/pictures/{n + 1}" for n in range(count)],
        preview=_data_url(ticket.preview) if previews and ticket and ticket.preview else None,
        summary=dict(record.summary),
    )


def _notices(ticket: Ticket | None, record: Record) -> dict[str, None]:
    """What was told, once each."""
    if ticket:
        return dict.fromkeys(notice for event in ticket.seen(0) for notice in event.notices)
    return dict.fromkeys(record.summary.get("notices", ()))


def _is_picture(value: Any) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(one, Image.Image) or (isinstance(one, dict) and PICTURE in one) for one in values)


def _position(service: Service, record: Record) -> int | None:
    if record.state.is_end:
        return None
    waiting = [ticket.id for ticket in service.active]
    return waiting.index(record.id) if record.state is State.WAITING and record.id in waiting else 0


def _data_url(image: Image.Image) -> str:
    content = encoded(image.convert("RGB"), "JPEG", 80)
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


async def _events(service: Service, job: Ticket | Record, previews: bool) -> AsyncIterator[str]:
    before, silent_seconds = "", 0.0
    shown: Image.Image | None = None

    async def news() -> str:
        """What is to be sent; '' if that was sent before. A preview is sent once."""
        nonlocal before, shown
        preview = job.preview if isinstance(job, Ticket) and previews else None
        is_new, shown = preview is not shown, preview
        text = (await run_in_threadpool(told, service, job, is_new)).model_dump_json()
        if not is_new and text == before:
            return ""
        before = text if not is_new else ""
        return f"event: job\ndata: {text}\n\n"

    if isinstance(job, Record):
        yield await news()
        return
    async for _ in moments(job, _TICK_SECONDS):
        if text := await news():
            silent_seconds = 0.0
            yield text
        else:
            silent_seconds += _TICK_SECONDS
        if silent_seconds >= _ALIVE_SECONDS:
            silent_seconds = 0.0
            yield ": alive\n\n"


# ------------------------------------------------------------------------------------------ plans


@router.post("/plan", openapi_extra=body_of(PLAN))
async def plan(request: Request, service: Served, door: Doored) -> Response:
    """Every way to run a request, here or on a card of profiles/: each pass with its table, the way that will
    be taken first. Nothing is loaded."""
    given = await asked(request, PLAN, door.model)
    # FastAPI would walk through the 200 kB of 180 plans once more, 20 ms before the page's bar moves.
    desk = request.app.state.planning
    content = await attended(request, lambda is_wanted: json.dumps(_planned(service, given, is_wanted)), desk)
    return Response(content, media_type="application/json")


def _planned(service: Service, given: Any, is_wanted: Callable[[], bool]) -> dict[str, Any]:
    name = given.others.get("hardware")
    hardware = profile(name) if name else service.hardware
    options = {"prompt": "", **given.options}
    passes = service.planned(given.model, options, hardware, is_wanted, **given.wishes)
    tables = [_table(one) for one in passes]
    chosen = [one.plans[0].predicted for one in passes if one.plans]
    return {
        "model": given.model,
        "hardware": hardware.name,
        "device": hardware.device,
        "notes": list(hardware.notes),
        "budget_bytes": _budget(service, hardware, given.wishes),
        "fits": all(one.refusal is None for one in passes),
        "error": next((str(one.refusal) for one in passes if one.refusal), ""),
        "seconds": sum(one.seconds for one in chosen),
        "peak_bytes": max((one.peak_bytes for one in chosen), default=0),
        "passes": tables,
    }


def _budget(service: Service, hardware: Hardware, wishes: Mapping[str, Any]) -> int:
    return budget_of(hardware, replace(service.wishes, **wishes))


def _table(one: Planned) -> dict[str, Any]:
    """A pass: what of it costs, and its plans."""
    costs = [name for name, about in described(Wish).items() if about.costs]
    return {
        "request": {name: getattr(one.job, name) for name in costs},
        "notes": list(one.job.spec.notes),
        "plans": [_brief(plan) for plan in one.plans],
    }


def _brief(plan: Plan) -> dict[str, Any]:
    """A plan with its words: `wishes` asks for it, or for one alike, by name."""
    denoiser, decoder = plan.denoiser, plan.decoder
    wishes = {name: getattr(denoiser, name) for name in _PLANNED} | {
        "tiling": decoder.tiling,
        "cfg": plan.cfg,
    }
    return plan.to_json() | {"summary": plan.summary(), "wishes": wishes}


# ------------------------------------------------------------------------------------------ what there is


@router.get("/models")
def models(request: Request) -> dict[str, Any]:
    """What can be named: of each file what it is, and what it would run as here. The first time takes seconds
    for each model that was never planned."""
    return {"models": request.app.state.catalogue.rows()}


@router.get("/info")
def info(service: Served, door: Doored) -> dict[str, Any]:
    """What serves: the machine, what is free and loaded, versions, limits, and the queue."""
    hardware, active, at_work = service.hardware, service.active, service.at_work
    return {
        "version": __version__,
        "versions": _versions(),
        "model": door.model,
        "machine": {
            "name": hardware.name,
            "device": hardware.device,
            "total_bytes": hardware.total_bytes,
            "precisions": list(hardware.precisions),
            "notes": list(hardware.notes),
        },
        "free_bytes": _free(hardware),
        "budget_bytes": budget_of(hardware, service.wishes),
        "loaded": service.loaded(),
        "limits": asdict(service.limits) | {"body_bytes": door.body_bytes},
        "queue": {
            "waiting": len(active) - len(at_work),
            "running": at_work[0].id if at_work else None,
        },
    }


def _free(hardware: Hardware) -> int:
    """Now; as it was found at the start where that cannot be said."""
    try:
        return Hardware.detect(hardware.device).free_bytes
    except TightfitError:
        return hardware.free_bytes


def _versions() -> dict[str, str]:
    libraries = ("torch", "diffusers", "transformers", "onnxruntime")
    known = {name: installed(name) for name in libraries}
    return {"python": platform.python_version(), **{name: one for name, one in known.items() if one}}


# ------------------------------------------------------------------------------------------ health

health = APIRouter(tags=["health"])


@health.get("/healthz")
async def alive() -> dict[str, bool]:
    """Whether the process answers."""
    return {"alive": True}


@health.get("/readyz")
async def ready(service: Served) -> dict[str, bool]:
    """Whether jobs are taken."""
    if not service.is_open:
        raise RefusedError("the service is closed: no more requests are taken", 503)
    return {"ready": True}
