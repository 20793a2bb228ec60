"""What handlers of every API share: the service, jobs awaited without blocking, pictures in and out."""

from __future__ import annotations

import asyncio
import base64
import binascii
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from io import BytesIO
from typing import Annotated, Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, Request
from PIL import Image

from ..conditions.input_pictures import decoded
from ..errors import TightfitError
from ..pictures import PARAMETERS, written_as
from ..planner.choose import UnwantedError
from ..service import Service, Ticket
from .failures import RefusedError
from .guard import Door, release

T = TypeVar("T")
AT_ONCE, MOST_WAITING = 4, 16  # plans that are made, and that wait for it
_LOOK_SECONDS = 0.1  # from one look at whether a client is there to the next


def _service(request: Request) -> Service:
    return request.app.state.service


def _door(request: Request) -> Door:
    return request.app.state.door


Served = Annotated[Service, Depends(_service)]
"""A handler's parameter: the service."""
Doored = Annotated[Door, Depends(_door)]
"""A handler's parameter: how the service is reached, and which model is meant where none is named."""


def client_of(request: Request) -> str:
    """Who asks, for fairness: an address, as all have one key."""
    return request.client.host if request.client else ""


async def moments(ticket: Ticket, tick_seconds: float | None = None) -> AsyncIterator[None]:
    """Each time something of a job may have changed, and after so many seconds without, until it has ended;
    also at once, and at the end. Nothing blocks meanwhile."""
    loop, news = asyncio.get_running_loop(), asyncio.Event()
    end = ticket.listen(lambda: loop.call_soon_threadsafe(news.set))
    try:
        while True:
            is_end = ticket.state.is_end
            news.clear()
            yield
            if is_end:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), tick_seconds)
    finally:
        end()


async def ended(ticket: Ticket, request: Request | None = None) -> Ticket:
    """The job once it has ended; cancelled where the client of `request` goes away before. What `request`
    sent is taken as read."""
    if request is not None:
        release(request.scope)

    async def wait() -> None:
        async for _ in moments(ticket):
            pass

    waiting = asyncio.ensure_future(wait())
    try:
        while not waiting.done():
            await asyncio.wait([waiting], timeout=0.5)
            if request is not None and not waiting.done() and await request.is_disconnected():
                ticket.cancel()
                await waiting
    finally:
        waiting.cancel()
    return ticket


async def attended(request: Request, work: Callable[[Callable[[], bool]], T], desk: CapacityLimiter) -> T:
    """What `work` answers, which is done in a thread of `desk` and told how to find out whether the client
    of `request` still waits. Raises RefusedError where too many wait, and UnwantedError for one that has gone
    before its turn."""
    if desk.statistics().tasks_waiting >= MOST_WAITING:
        raise RefusedError("too many plans are asked for at once: try again later", 503)
    has_gone = threading.Event()

    def begun() -> T:
        if has_gone.is_set():
            raise UnwantedError("nobody waits for these plans any more")
        return work(lambda: not has_gone.is_set())

    working = asyncio.ensure_future(to_thread.run_sync(begun, limiter=desk))
    try:
        while not working.done():
            await asyncio.wait([working], timeout=_LOOK_SECONDS)
            if not working.done() and await request.is_disconnected():
                has_gone.set()
    finally:
        has_gone.set()
    return await working


def picture_of(text: Any, name: str, most_pixels: int = sys.maxsize) -> Image.Image:
    """The picture in base64, also in a data URL. Raises TightfitError, for one of more pixels before they are
    decoded; an address is never fetched."""
    return decoded(content_of(text, name), name, most_pixels)


def content_of(text: Any, name: str) -> bytes:
    """The file of a picture in base64, as `picture_of` takes it."""
    if not isinstance(text, str):
        raise TightfitError(f"{name} must be a picture in base64, not {type(text).__name__}")
    head, comma, rest = text.partition(",")
    if comma and not (head.startswith("data:") and head.endswith(";base64")):
        raise TightfitError(f"{name} must be a picture in base64: addresses are not fetched")
    try:
        return base64.b64decode((rest if comma else text).strip(), validate=True)
    except (binascii.Error, ValueError):
        raise TightfitError(f"{name} is not valid base64: encode the file of a picture") from None


def base64_of(image: Image.Image) -> str:
    """A picture's PNG in base64, with its text inside."""
    return base64.b64encode(encoded(image)).decode()


def encoded(image: Image.Image, kind: str = "PNG", quality: int = 90) -> bytes:
    """A picture's file, with its text inside where that is PNG."""
    stream = BytesIO()
    if kind == "PNG":
        image.save(stream, **written_as({PARAMETERS: image.info.get(PARAMETERS)}, kind))
    else:
        image.save(stream, kind, quality=quality)
    return stream.getvalue()
