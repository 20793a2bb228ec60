"""The application: one service, behind its APIs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import CapacityLimiter
from fastapi import APIRouter, FastAPI

from ... import __version__
from ..service import Service
from . import a1111, metrics, openai, own, page
from .catalogued import Catalogue
from .failures import explain
from .guard import Door, Guard
from .served import AT_ONCE

ROUTERS: tuple[APIRouter, ...] = (own.router, own.health, metrics.router, a1111.router, openai.router)
"""Each API's, in a file of its own."""


def create(service: Service, door: Door | None = None) -> FastAPI:
    """The application of a service, which is closed when the application ends; without a door it is for
    requests to this machine's own name alone."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # The pages that FastAPI has of its own fetch scripts from elsewhere.
    app = FastAPI(title="tightfit", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service, app.state.door = service, door or Door()
    app.state.catalogue, app.state.numbers = Catalogue(service), metrics.Numbers(service)
    app.state.planning = CapacityLimiter(AT_ONCE)
    explain(app)
    for router in (*ROUTERS, *[page.router] * app.state.door.page):
        app.include_router(router)
    app.add_middleware(Guard, door=app.state.door, refused=app.state.numbers.refused)
    return app
