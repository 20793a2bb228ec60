"""What goes wrong, in each API's own shape: one line, never a traceback."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import TightfitError, out_of_memory
from ..jobs import UnkeptError
from ..service import QueueFullError

RETRY_SECONDS = 10
BROKEN = "something went wrong here: the server's log says what"
_KINDS = {401: "authentication_error", 403: "permission_error"}


class RefusedError(TightfitError):
    """A client's fault with a status, and a code, of its own; `param`: the field that it is of."""

    def __init__(
        self, text: str, status: int = 400, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(text)
        self.status, self.code, self.param = status, code, param


def said(path: str, status: int, text: str, **about: Any) -> dict[str, Any]:
    """The body of an error's answer, in the shape of the API that `path` is of."""
    if path.startswith(("/sdapi/", "/controlnet/")):
        return as_a1111(HTTPStatus(status).phrase.replace(" ", ""), text)
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": text, "type": kind, "param": None, "code": None}
    return {"error": {**error, **about}, "detail": text}


def as_a1111(name: str, text: str) -> dict[str, str]:
    """The same in A1111's shape: its `detail` is what clients show."""
    return {"error": name, "detail": text, "body": "", "errors": text}


def failure(path: str, error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body of what a handler raised."""
    about: Mapping[str, Any] = {}
    text = str(error)
    if isinstance(error, RefusedError):
        status, about = error.status, {"code": error.code, "param": error.param}
    elif isinstance(error, QueueFullError | UnkeptError):  # or the disk is, for now
        status = 503
    elif isinstance(error, RequestValidationError):
        status, text = 422, in_one_line(error.errors())
    elif isinstance(error, HTTPException):
        status, text = error.status_code, str(error.detail)
    elif isinstance(error, TightfitError):
        status = 400
    elif out_of_memory(error):
        status, text = 500, "memory ran out: ask for a smaller picture, or close what else uses it"
    else:
        status, text = 500, BROKEN
    return status, said(path, status, text, **about)


def in_one_line(errors: Any) -> str:
    """What pydantic says of fields, the first of them."""
    first, *others = errors
    place = ".".join(str(part) for part in first.get("loc", ()) if part != "body")
    more = f" (and {len(others)} more)" if others else ""
    return f"{place[:100] or 'the request'}: {first.get('msg', 'is not valid')}{more}"


def explain(app: FastAPI) -> None:
    """Have every handler of `app` fail so."""

    async def answered(request: Request, error: Exception) -> JSONResponse:
        status, body = failure(request.url.path, error)
        headers = {"Retry-After": str(RETRY_SECONDS)} if status == 503 else getattr(error, "headers", None)
        return JSONResponse(body, status, headers)

    for kind in (TightfitError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answered)
