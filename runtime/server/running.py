"""The server's process: one loop, one queue, and how both end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..service import Service
from .app import create
from .guard import Door
from .metrics import AsJson, journal

_LEAVE_SECONDS = 10  # for clients that read slowly, once their jobs have ended
_PLAIN = "%(asctime)s %(levelname)s %(message)s"


class Punctual(H11Protocol):
    """Hangs up on clients that pause within the head of a request, which holds a connection for ever
    otherwise."""

    silence_seconds = 30.0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_in_head:
            self._await_head()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    @property
    def _is_in_head(self) -> bool:
        """Whether bytes of a request are here that do not make one yet."""
        is_idle = self.cycle is None or self.cycle.response_complete
        return is_idle and bool(self.conn.trailing_data[0])

    def _await_head(self) -> None:
        if self._late is None:  # bytes one by one win no time
            self._late = self.loop.call_later(self.silence_seconds, self._hang_up)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _hang_up(self) -> None:
        self._late = None
        if not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """Ends in order: on a signal no more jobs are taken, the running one ends after its step, waiting ones
    stay for the next start. On a second signal it ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
        with suppress(OSError):  # nobody reads any more
            os.write(1, b"stopping after this step; again to end at once\n")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Requests that wait for their job are answered then, and uvicorn waits for those.
        await asyncio.to_thread(self._service.close)
        await super().shutdown(sockets)


def run(service: Service, door: Door, listening: socket.socket, *, as_json: bool = False) -> None:
    """Serve until a signal."""
    _log(as_json)
    journal(service)
    Server(configured(service, door), service).run(sockets=[listening])


def configured(service: Service, door: Door, **others: Any) -> uvicorn.Config:
    """The application, and how it is listened for."""
    return uvicorn.Config(
        create(service, door),
        http=type("Patient", (Punctual,), {"silence_seconds": door.silence_seconds}),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # any program here could name itself another client
        lifespan="on",
        timeout_graceful_shutdown=_LEAVE_SECONDS,
        **others,
    )


def _log(as_json: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(AsJson() if as_json else logging.Formatter(_PLAIN))
    for name, level in (("tightfit", logging.INFO), ("uvicorn", logging.WARNING)):
        logger: Any = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    logging.getLogger("tightfit.service").setLevel(logging.WARNING)  # each change is in the journal
