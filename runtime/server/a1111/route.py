"""The form of A1111's answers: JSON that every client can read, and its errors."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import Field
from starlette.exceptions import HTTPException

from ...errors import TightfitError
from ...service import QueueFullError
from ..failures import BROKEN, as_a1111

LOG = logging.getLogger("tightfit.server")
_RETRY_SECONDS = "5"
_MOST_DEPTH = 50  # of what a client sent, which is answered
_MOST_ERRORS = 10  # that are told
AtMost = Field(max_length=1000)
"""What every list of a body says of itself: a longer one is refused before each item is looked at."""
Texts = Annotated[list[str], AtMost]


class NotFoundError(TightfitError):
    """Something is named that is not here."""


class Answer(JSONResponse):
    """JSON in ASCII: text of a client may have half of a surrogate pair, which UTF-8 cannot hold."""

    def render(self, content: Any) -> bytes:
        return json.dumps(_finite(content), allow_nan=False).encode("ascii")


def _finite(value: Any, depth: int = _MOST_DEPTH) -> Any:
    """Without numbers that JSON has not, and no deeper than can be written."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if not isinstance(value, dict | list | tuple):
        return value
    if not depth:
        return None
    if isinstance(value, dict):
        return {name: _finite(one, depth - 1) for name, one in value.items()}
    return [_finite(one, depth - 1) for one in value]


class Route(APIRoute):
    """Answers errors as A1111 does: its `detail` is what clients show."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                errors = error.errors()[:_MOST_ERRORS]
                said = [{name: one[name] for name in ("loc", "msg", "type")} for one in errors]
                return Answer({"detail": said}, 422)
            except QueueFullError as error:
                return _failed(error, 503, {"Retry-After": _RETRY_SECONDS})
            except NotFoundError as error:
                return _failed(error, 404)
            except TightfitError as error:
                return _failed(error, 422)
            except HTTPException as error:
                return _failed(error, error.status_code, error.headers, str(error.detail))
            except Exception as error:
                LOG.exception("%s %s", request.method, request.url.path)
                return _failed(error, 500, detail=BROKEN)

        return handled


def _failed(error: Exception, status: int, headers: Any = None, detail: str = "") -> Answer:
    name = "HTTPException" if isinstance(error, TightfitError) else type(error).__name__
    return Answer(as_a1111(name, detail or str(error)), status, headers)
