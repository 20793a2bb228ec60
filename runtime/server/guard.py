"""Who may ask, from where, and how much: checked before any API sees a request."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ..units import shown
from .failures import RETRY_SECONDS, said

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SAFE = ("GET", "HEAD", "OPTIONS")
_OPEN = ("/healthz", "/readyz")  # probes have no key
_BODIES = 8  # of the largest size that are in memory at once
_BODY_SECONDS = 600  # for one that keeps coming
_REST_BYTES, _REST_SECONDS = 2**25, 1  # of a refused one, which are taken so that its client reads why
_MOST_VALUES = 2**17  # in a body of JSON, whose parser answers nobody else meanwhile
_RELEASE = "tightfit.release"  # in a request's scope
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}


@dataclass(frozen=True)
class Door:
    """How a service is reached.

    model: what is meant where none is named. api_key: what every request must have, if any. host: the address
    that is listened on; hosts: others that it is called by, "*" for any. origins: of pages elsewhere whose
    requests are taken, "*" for all. body_bytes: of a request at most. silence_seconds: that a request may
    pause while it is sent. page: whether there is one. secret: by which addresses are signed, until it ends.
    """

    model: str = "emoji"
    api_key: str = ""
    host: str = "127.0.0.1"
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    body_bytes: int = 64 * 2**20
    silence_seconds: float = 30
    page: bool = True
    secret: str = field(
        default_factory=lambda: token_hex(32), repr=False
    )  # of signatures: none tells of the key

    def serves(self, host: str) -> bool:
        """Whether a Host header is of here. A page elsewhere whose name is made to lead here has that name in
        it; an address of numbers is nobody's name."""
        name = _name(host)
        return "*" in self.hosts or name in {*_LOOPBACK, self.host.lower(), *self.hosts} or _is_number(name)

    def trusts(self, origin: str, host: str) -> bool:
        """Whether a page may ask: our own, or one of `origins`."""
        with suppress(ValueError):  # an address that is none
            return self._knows(origin) or urlsplit(origin).netloc.lower() == host.lower()
        return False

    def _knows(self, origin: str) -> bool:
        return "*" in self.origins or origin in self.origins

    def cors(self, origin: str | None) -> dict[str, str]:
        """What tells a browser that a page elsewhere may read the answer."""
        if not self.origins:
            return {}
        told = {"access-control-allow-origin": origin} if origin and self._knows(origin) else {}
        return {**told, "vary": "Origin"}

    def signed(self, path: str) -> str:
        """The path with what opens it, and nothing else, to who has no key."""
        return f"{path}?signature={self._signature(path)}" if self.api_key else path

    def _signature(self, path: str) -> str:
        return hmac.new(self.secret.encode(), path.encode(), "sha256").hexdigest()

    def has_signed(self, path: str, signature: str) -> bool:
        return hmac.compare_digest(signature.encode(), self._signature(path).encode())

    def opens(self, headers: dict[str, str]) -> bool:
        """Whether the key is there: as a bearer's, in X-API-Key, or as the password, or user:password, of
        HTTP Basic."""
        if not self.api_key:
            return True
        kind, _, value = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", "").encode("latin-1")]
        if kind.lower() == "bearer":
            given.append(value.strip().encode("latin-1"))
        elif kind.lower() == "basic":
            given += _basic(value)
        # All are compared, each in a time that tells nothing of the key.
        return sum(hmac.compare_digest(one, self.api_key.encode()) for one in given) > 0


def _is_signed(scope: Any, door: Door) -> bool:
    given = parse_qs(scope["query_string"].decode("latin-1")).get("signature", [""])[0]
    return scope["method"] in ("GET", "HEAD") and door.has_signed(scope["path"], given)


def _basic(value: str) -> list[bytes]:
    """The two ways in which HTTP Basic can say a key."""
    try:
        text = base64.b64decode(value.strip(), validate=True)
    except (binascii.Error, ValueError):
        return []
    return [text, text.partition(b":")[2]]


def _name(host: str) -> str:
    """Of a Host header, without its port."""
    bare = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
    return bare.lower().rstrip(".")


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """ASGI middleware: refuses what `door` does not let in, and reads each body before it is looked at.
    `refused` is told the status of each refusal, of the APIs' own too."""

    def __init__(self, app: Any, door: Door, refused: Callable[[int], object] = lambda _: None) -> None:
        self._app, self._door, self._refused = app, door, refused
        self._held = _Held()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no websockets here
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        cors = self._door.cors(headers.get("origin"))
        answering = _Answer(scope["path"], send, cors, self._refused)
        if refusal := self._refusal(scope, headers):
            await answering.refuse(*refusal)
        elif scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await answering.preflight(headers)
        else:
            await self._passed(scope, receive, answering, headers)

    def _refusal(self, scope: Any, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and reason of what is not let in."""
        door, host = self._door, headers.get("host", "")
        if not door.serves(host):
            return 421, f"nothing is served here as {host[:80]!r}: --allow-host lets that name in"
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        is_preflight = "access-control-request-method" in headers and scope["method"] == "OPTIONS"
        if scope["method"] not in _SAFE or is_preflight:
            foreign = origin is None and site not in ("none", "same-origin")
            if foreign or (origin is not None and not door.trusts(origin, host)):
                return (
                    403,
                    f"requests from pages of {origin or 'elsewhere'} are not taken: --cors lets them in",
                )
        if scope["path"] in _OPEN or is_preflight or door.opens(headers) or _is_signed(scope, door):
            return None
        return 401, "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"

    async def _passed(self, scope: Any, receive: Any, answering: _Answer, headers: dict[str, str]) -> None:
        """Read the body whole, within the limits, then let the request in."""
        most, length = self._door.body_bytes, headers.get("content-length", "0")
        if not length.isdigit() or len(length) > 18 or int(length) > most:
            await answering.refuse(413, f"a request has at most {shown(most)} here", receive)
            return
        hold = _Hold(self._held)
        try:
            rest = await self._body(receive, hold)
            if rest and not headers.get("content-type", "").startswith("multipart/"):
                _check_values(rest[0])
        except _TooLargeError as error:
            await answering.refuse(413, str(error) or f"a request has at most {shown(most)} here", receive)
        except _BusyError:
            await answering.refuse(503, "too many large requests at once: try again later", receive)
        except TimeoutError:
            await answering.refuse(408, "the request did not come to its end: send it without pauses")
        else:
            if rest is not None:
                scope = {**scope, _RELEASE: hold.release}
                await self._app(scope, _replayed(rest, receive), answering.send)
        finally:
            hold.release()

    async def _body(self, receive: Any, hold: _Hold) -> list[bytes] | None:
        """The whole body, alone in a list; None where the client went away before its end."""
        parts: list[bytes] = []
        async with asyncio.timeout(_BODY_SECONDS):
            while True:
                async with asyncio.timeout(self._door.silence_seconds):
                    message = await receive()
                if message["type"] != "http.request":
                    return None
                parts.append(message.get("body", b""))
                hold.take(len(parts[-1]), _BODIES * self._door.body_bytes)
                if hold.count_bytes > self._door.body_bytes:
                    raise _TooLargeError
                if not message.get("more_body"):
                    return [b"".join(parts)]


class _TooLargeError(Exception):
    pass


class _BusyError(Exception):
    pass


@dataclass
class _Held:
    """Bytes of all bodies that are in memory."""

    total_bytes: int = 0


@dataclass
class _Hold:
    """Those of one body, until it is read."""

    held: _Held
    count_bytes: int = 0

    def take(self, count: int, most_bytes: int) -> None:
        if self.held.total_bytes + count > most_bytes:
            raise _BusyError
        self.count_bytes += count
        self.held.total_bytes += count

    def release(self) -> None:
        self.held.total_bytes -= self.count_bytes
        self.count_bytes = 0


def release(scope: Mapping[str, Any]) -> None:
    """A handler has read the body of this request: it counts no longer as one that is in memory."""
    scope.get(_RELEASE, lambda: None)()


def _check_values(body: bytes) -> None:
    if sum(map(body.count, (b"[", b"{", b","))) > _MOST_VALUES:
        raise _TooLargeError(f"a request has at most {_MOST_VALUES} values here: ask for fewer")


def _replayed(rest: list[bytes], receive: Any) -> Any:
    """What hands the body over once, then what comes after it: that the client has gone."""

    async def again() -> Any:
        return {"type": "http.request", "body": rest.pop(), "more_body": False} if rest else await receive()

    return again


class _Answer:
    """What is sent back, with the headers that all answers have."""

    def __init__(self, path: str, send: Any, cors: dict[str, str], refused: Callable[[int], object]) -> None:
        self._path, self._send, self._refused = path, send, refused
        self._headers = {**_HEADERS, **cors}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 400:
                self._refused(message["status"])
            known = {name.lower() for name, _ in message.get("headers", ())}
            added = [
                (n.encode(), v.encode("latin-1")) for n, v in self._headers.items() if n.encode() not in known
            ]
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await self._send(message)

    async def refuse(self, status: int, text: str, receive: Any = None) -> None:
        """`receive`: of what is left of the body, which is read a little."""
        more = {
            401: {"www-authenticate": 'Basic realm="tightfit"'},
            503: {"retry-after": str(RETRY_SECONDS)},
        }.get(status, {})
        more |= {"connection": "close"} if status in (408, 413, 503) else {}
        content = json.dumps(said(self._path, status, text)).encode()
        await self._whole(status, {"content-type": "application/json", **more}, content, receive)

    async def preflight(self, headers: dict[str, str]) -> None:
        """What a browser asks before it sends another page's request."""
        allowed = {
            "access-control-allow-methods": "GET, POST, DELETE",
            "access-control-allow-headers": headers.get("access-control-request-headers", ""),
            "access-control-max-age": "600",
        }
        await self._whole(204, allowed, b"")

    async def _whole(self, status: int, headers: dict[str, str], content: bytes, receive: Any = None) -> None:
        named = {**headers, "content-length": str(len(content))} if content else headers
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in named.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": content, "more_body": True})
        if receive:  # a connection that is closed on unread bytes is reset, and the answer may be lost
            await _drain(receive)
        await self.send({"type": "http.response.body", "body": b""})


async def _drain(receive: Any) -> None:
    """Let go of what comes, to the body's end or within bounds."""
    count_bytes, has_more = 0, True
    with suppress(TimeoutError):
        async with asyncio.timeout(_REST_SECONDS):
            while has_more and count_bytes < _REST_BYTES:
                message = await receive()
                count_bytes += len(message.get("body", b""))
                has_more = message.get("more_body", False)
