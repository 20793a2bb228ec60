"""A1111's txt2img and img2img, and how they are followed: progress, interrupt, skip."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image
from pydantic import BaseModel

from ...adapters.vae import Vae
from ...errors import TightfitError
from ...infotext import stem
from ...jobs import State
from ...models.samplers.names import SAMPLERS, split
from ...pictures import PARAMETERS
from ...request import RANDOM_SEED, drawn
from ...service import Ticket
from ..served import base64_of, client_of, ended
from .desk import At, Desk
from .route import Answer, Route
from .words import Asked, ImageToImage, TextToImage, order_of

router = APIRouter(tags=["A1111"], route_class=Route, default_response_class=Answer)


@router.post("/txt2img")
async def txt2img(body: TextToImage, at: At, request: Request) -> Answer:
    return await _painted("txt2img", body, at, request)


@router.post("/img2img")
async def img2img(body: ImageToImage, at: At, request: Request) -> Answer:
    return await _painted("img2img", body, at, request)


async def _painted(what: str, body: BaseModel, desk: Desk, request: Request) -> Answer:
    asked = await asyncio.to_thread(Asked.read, what, body)

    def queued() -> Ticket:
        return desk.service.queue(order_of(asked, desk, client_of(request)))

    ticket = await asyncio.to_thread(queued)
    override = asked["override_settings"]
    if override and asked["override_settings_restore_afterwards"] is False:
        await asyncio.to_thread(desk.options.change, override)
    await ended(ticket, request)
    return await asyncio.to_thread(_answer, asked, desk, finished(ticket))


def finished(ticket: Ticket) -> Ticket:
    """A job that has ended, with what it has painted. Raises why it has not."""
    if ticket.state in (State.FAILED, State.CANCELLED, State.POSTPONED):
        ticket.result()
    return ticket


def _answer(asked: Asked, desk: Desk, ticket: Ticket) -> Answer:
    images, digest = ticket.images, ""
    with suppress(TightfitError):  # the model was removed meanwhile
        digest = desk.shelf.checkpoint(ticket.record.order.model).short_digest
    shown = images if asked["send_images"] is not False else []
    said = json.dumps(info(asked, ticket, images, digest))
    answer = {"images": [*map(base64_of, shown)], "parameters": asked.echo(), "info": said}
    return Answer(answer)  # as FastAPI would write it anew, pictures and all


def info(asked: Asked, ticket: Ticket, images: list[Image.Image], digest: str) -> dict[str, Any]:
    """What A1111 says of pictures (its modules/processing.py, Processed). digest: the model's."""
    order = ticket.record.order
    said: Mapping[str, Any] = {**order.options, **ticket.record.summary.get("request", {})}
    count, share = len(images), said.get("subseed_strength") or 0.0
    seed, subseed = said["seed"], said.get("subseed", asked["subseed"])
    subseed = drawn(None if subseed in (None, RANDOM_SEED) else subseed)  # told also where it does nothing
    seeds = [seed + (0 if share else place) for place in range(count)]
    subseeds = [subseed + place for place in range(count)]
    prompt, negative = " ".join([said["prompt"], *_words(order.options)]), said.get("negative_prompt") or ""
    return {
        "prompt": prompt,
        "all_prompts": [prompt] * count,
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * count,
        "seed": seed,
        "all_seeds": seeds,
        "subseed": subseed,
        "all_subseeds": subseeds,
        "subseed_strength": share,
        "width": said.get("width"),
        "height": said.get("height"),
        "sampler_name": _sampler(said.get("scheduler")),
        "cfg_scale": said.get("guidance_scale"),
        "steps": said.get("num_inference_steps"),
        "batch_size": asked["batch_size"] or 1,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": stem(order.model),
        "sd_model_hash": digest,
        "sd_vae_name": said.get(Vae.option),
        "sd_vae_hash": None,
        "seed_resize_from_w": asked["seed_resize_from_w"],
        "seed_resize_from_h": asked["seed_resize_from_h"],
        "denoising_strength": said.get("strength", said.get("hires_strength") if said.get("hires") else None),
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [image.info.get(PARAMETERS, "") for image in images],
        "styles": asked["styles"] or [],
        "job_timestamp": timestamp(ticket),
        "clip_skip": said.get("clip_skip", 1),
        "is_using_inpainting_conditioning": False,
        "version": "tightfit",
    }


def _words(options: Mapping[str, Any]) -> list[str]:
    """LoRAs as A1111 has them in a prompt."""
    words = []
    for text in options.get("lora", ()):
        name, *weights = text.split(":")
        words.append(f"<lora:{':'.join([name, *reversed(weights)])}>")
    return words


def _sampler(name: str | None) -> str | None:
    return SAMPLERS[split(name)[0].name].a1111 if name else None


def timestamp(ticket: Ticket) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.localtime(ticket.record.created))


@router.get("/progress")
def progress(at: At, request: Request, skip_current_image: bool = False) -> dict[str, Any]:
    ticket = at.service.running_of(client_of(request))
    if ticket is None or ticket.state.is_end:
        return {
            "progress": 0.0,
            "eta_relative": 0.0,
            "state": _state(None),
            "current_image": None,
            "textinfo": None,
        }
    preview = None if skip_current_image else ticket.preview
    return {
        "progress": min(0.01 + ticket.done, 1.0),  # never 0 of a job that runs, as clients wait for that
        "eta_relative": ticket.eta_seconds or 0.0,
        "state": _state(ticket),
        "current_image": base64_of(preview) if preview else None,
        "textinfo": None,
    }


def _state(ticket: Ticket | None) -> dict[str, Any]:
    last = ticket.last if ticket else None
    count = (ticket.record.order.options.get("num_images") or 1) if ticket else 0
    each = last.steps // count if last and count else 0
    is_painting = last is not None and last.stage == "denoise"
    return {
        "skipped": False,
        "interrupted": bool(ticket and ticket.wanted),
        "stopping_generation": False,
        "job": (ticket.record.order.note.get("job") or ticket.record.order.does) if ticket else "",
        "job_count": count,
        "job_timestamp": timestamp(ticket) if ticket else "0",
        "job_no": last.image if last else 0,
        "sampling_step": last.step - last.image * each if last and is_painting else 0,
        "sampling_steps": each if is_painting else 0,
    }


@router.post("/interrupt")
def interrupt(at: At, request: Request) -> dict[str, Any]:
    """Stop what runs of this client's, after its step: pictures that are painted are answered."""
    ticket = at.service.running_of(client_of(request))
    if ticket and ticket.record.order.client == client_of(request):
        ticket.stop()
    return {}


@router.post("/skip")
def skip(at: At, request: Request) -> None:
    """As interrupt: pictures of a request are not skipped one by one."""
    interrupt(at, request)
