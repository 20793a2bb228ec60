"""The application: one service, behind its APIs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI

from ..service import Service

ROUTERS: tuple[APIRouter, ...] = ()
"""Each API's, in a file of its own."""


def create(service: Service) -> FastAPI:
    """The application of a service, which is closed when the application ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="tightfit", lifespan=lifespan)
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router)
    return app
