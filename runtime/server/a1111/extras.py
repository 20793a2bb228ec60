"""A1111's extras: pictures enlarged, and what a picture says of how it was made."""

from __future__ import annotations

import asyncio
import html
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from ...conditions.handed import PIXELS, way_of
from ...errors import TightfitError
from ...infotext import is_json, said_in
from ...jobs import Order
from ...pictures import KEPT, PARAMETERS, texts_inside
from ...programs import Said
from ...programs import read as read_others
from ...service import Ticket
from ..served import base64_of, client_of, content_of, ended
from .desk import At, Desk
from .painting import finished
from .route import Answer, AtMost, NotFoundError, Route

router = APIRouter(tags=["A1111"], route_class=Route, default_response_class=Answer)
_Share = Annotated[float, Field(ge=0, le=1)]
_Side = Annotated[int, Field(ge=1, le=2**15)]
_MOST_SCALE = 8  # where A1111's slider ends
_OURS = "tightfit"  # our exact JSON among the settings


class Extras(BaseModel):
    """How pictures are enlarged. resize_mode: 0 by a factor, 1 to a size."""

    model_config = ConfigDict(allow_inf_nan=False)

    resize_mode: Literal[0, 1] = 0
    show_extras_results: bool = True
    gfpgan_visibility: _Share = 0
    codeformer_visibility: _Share = 0
    codeformer_weight: _Share = 0
    upscaling_resize: Annotated[float, Field(gt=0, le=_MOST_SCALE)] = 2
    upscaling_resize_w: _Side = 512
    upscaling_resize_h: _Side = 512
    upscaling_crop: bool = True
    upscaler_1: str = "None"
    upscaler_2: str = "None"
    extras_upscaler_2_visibility: _Share = 0
    upscale_first: bool = False

    def check(self) -> None:
        """Raise TightfitError for what there is not."""
        for name in ("gfpgan_visibility", "codeformer_visibility"):
            if getattr(self, name):
                raise TightfitError(
                    f"{name} is not there in tightfit, as there is no face restoration: give 0"
                )
        if self.upscaler_2 != "None" and self.extras_upscaler_2_visibility:
            raise TightfitError("upscaler_2 is not there in tightfit: give one, by upscaler_1")

    def scale(self, image: Image.Image) -> float:
        if self.resize_mode == 0:
            return self.upscaling_resize
        return max(self.upscaling_resize_w / image.width, self.upscaling_resize_h / image.height)

    def cropped(self, image: Image.Image) -> Image.Image:
        """The middle of the size that is wanted, if one is."""
        if self.resize_mode == 0 or not self.upscaling_crop:
            return image
        wide, tall = self.upscaling_resize_w, self.upscaling_resize_h
        left, top = (image.width - wide) // 2, (image.height - tall) // 2
        cut = image.crop((left, top, left + wide, top + tall))
        cut.info |= image.info
        return cut

    def said(self, scale: float) -> str:
        """As A1111 says it in HTML."""
        by = f"{self.upscaling_resize_w}x{self.upscaling_resize_h}" if self.resize_mode else f"{scale:g}"
        text = f"Postprocess upscale {'to' if self.resize_mode else 'by'}: {by}"
        return f"<p>{html.escape(f'{text}, Postprocess upscaler: {self.upscaler_1}')}</p>"


class ExtrasOfOne(Extras):
    image: str = ""


class File(BaseModel):
    data: str
    name: str


class ExtrasOfMany(Extras):
    imageList: Annotated[list[File], AtMost]  # noqa: N815  # A1111's name


@router.post("/extra-single-image")
async def extra_single_image(body: ExtrasOfOne, at: At, request: Request) -> dict[str, Any]:
    image, said = await _enlarged(body.image, "image", body, at, request)
    return {"html_info": said, "image": image}


@router.post("/extra-batch-images")
async def extra_batch_images(body: ExtrasOfMany, at: At, request: Request) -> dict[str, Any]:
    at.service.limits.check_counts(images=len(body.imageList))
    made = [await _enlarged(file.data, "imageList", body, at, request) for file in body.imageList]
    return {"html_info": made[0][1] if made else "", "images": [image for image, _ in made]}


async def _enlarged(text: str, name: str, body: Extras, desk: Desk, request: Request) -> tuple[str, str]:
    """The picture in base64, and what A1111 says of it."""
    body.check()
    image = await asyncio.to_thread(_with_text, text, name, desk)
    if body.upscaler_1 == "None":
        return await asyncio.to_thread(base64_of, image), "<p></p>"
    scale = body.scale(image)
    desk.service.limits.check_counts(pixels=round(image.width * scale) * round(image.height * scale))
    if (way := way_of(body.upscaler_1)) or scale < 1:
        larger = await asyncio.to_thread(_resized, image, scale, way or "lanczos")
    else:
        ticket = await asyncio.to_thread(_queued, image, scale, body.upscaler_1, desk, client_of(request))
        (larger,) = finished(await ended(ticket, request)).images
    return await asyncio.to_thread(lambda: base64_of(body.cropped(larger))), body.said(scale)


def _with_text(text: str, name: str, desk: Desk) -> Image.Image:
    """The picture, with what it says of how it was made, which it keeps."""
    image = desk.picture(text, name)
    try:
        said = texts_inside(content_of(text, name), name).get(PARAMETERS)
    except TightfitError:  # of a format that holds none
        said = None
    if said:
        image.info[PARAMETERS] = said
    return image


def _queued(image: Image.Image, scale: float, upscaler: str, desk: Desk, client: str) -> Ticket:
    options, note = {"image": image, "scale": scale}, {"job": "extras"}
    order = Order(desk.shelf.upscaler(upscaler), options, does="upscale", client=client, note=note)
    return desk.service.queue(order)


def _resized(image: Image.Image, scale: float, way: str) -> Image.Image:
    if way not in PIXELS:
        raise TightfitError(f"{way} enlarges latents, not pictures: give Lanczos, Nearest or an upscaler")
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    larger = image.resize(size, Image.Resampling[PIXELS[way].mode])
    larger.info |= image.info
    return larger


class Pictured(BaseModel):
    image: str


@router.post("/png-info")
def png_info(body: Pictured) -> dict[str, Any]:
    """What a picture says, in A1111's words whichever program wrote it."""
    content = content_of(body.image, "image")
    texts = texts_inside(content, "image", every=True)
    text = texts.get(PARAMETERS, "")
    said = _said(text, texts)
    return {
        "info": text or _written(said),
        "items": {name: value for name, value in texts.items() if name in KEPT and name != PARAMETERS},
        "parameters": _parameters(said) if said else {},
    }


def _said(text: str, texts: dict[str, str]) -> Said | None:
    if text and not is_json(text):
        return said_in(text, "the picture")
    try:
        return read_others(texts)
    except ValueError:
        return None


def _written(said: Said | None) -> str:
    """As A1111 would have written what another program says."""
    if said is None:
        return ""
    settings = ", ".join(f"{name}: {value}" for name, value in said.settings.items())
    negative = f"Negative prompt: {said.negative_prompt}" if said.negative_prompt else ""
    return "\n".join(filter(None, (said.prompt, negative, settings)))


def _parameters(said: Said) -> dict[str, str]:
    named = {"Prompt": said.prompt, "Negative prompt": said.negative_prompt or ""}
    for name, value in said.settings.items():
        sides = value.split("x")
        if name in ("Size", "Hires resize", "Seed resize from") and len(sides) == 2:
            named |= {f"{name}-1": sides[0], f"{name}-2": sides[1]}
        elif name != _OURS:
            named[name] = value
    return named


class Interrogated(BaseModel):
    image: str = ""
    model: str = "clip"


@router.post("/interrogate")
def interrogate(body: Interrogated) -> None:
    if not body.image:
        raise NotFoundError("Image not found")
    raise NotFoundError("Model not found: tightfit describes no pictures")
