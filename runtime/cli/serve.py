"""`tightfit serve`: the APIs of others' clients, our own, and a page, over HTTP."""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import os
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import interrupts
from ..errors import TightfitError
from ..fields import option
from ..files import state_folder
from ..planner.wishes import Wishes
from ..request import Request
from ..units import parse_bytes
from .options import MODEL, Device, ModelsDirs, taking
from .output import say

if TYPE_CHECKING:
    from ..asking import Shelves
    from ..machine.hardware import Hardware
    from ..server.guard import Door
    from ..service import Service

KEY, HOSTS = "TIGHTFIT_API_KEY", "TIGHTFIT_ALLOW_HOST"
_INSTALL = "the server needs packages that are not installed: pip install 'tightfit[serve]'"
_PANEL, _LIMITS = "Server", "Limits"


def _of_server(help: str, metavar: str | None = None, *names: str, **bounds: Any) -> Any:  # noqa: A002
    return typer.Option(
        *names, help=help, metavar=metavar, show_default=False, rich_help_panel=_PANEL, **bounds
    )


@dataclass(frozen=True)
class Options:
    """Options of `serve` besides those of Wishes and its limits."""

    host: Annotated[str, _of_server("Address; 127.0.0.1.", "ADDRESS")] = "127.0.0.1"
    port: Annotated[int, _of_server("7860; 0: a free one.", "N", min=0, max=65535)] = 7860
    model: Annotated[str, MODEL] = "emoji"
    models_dirs: ModelsDirs = None
    device: Device = "auto"
    state: Annotated[Path | None, _of_server("Where jobs and pictures are kept.", "DIR")] = None
    api_key: Annotated[str | None, _of_server(f"Else {KEY}.", "KEY")] = None
    cors: Annotated[list[str] | None, _of_server("Pages of there may ask.", "ORIGIN")] = None
    allow_host: Annotated[list[str] | None, _of_server("Another name of here.", "NAME", envvar=HOSTS)] = None
    ray: Annotated[str | None, _of_server("Paint there: auto, HOST:PORT.", "ADDRESS")] = None
    page: Annotated[bool, _of_server("The page, too.", None, "--page/--no-ui")] = True
    log_json: Annotated[bool, _of_server("One JSON object a line.", None, "--log-json")] = False


def _limit(text: str) -> Any:
    return option(None, text, "N", panel=_LIMITS)


# Of service.Limits, which takes long to import, by its fields; and of a request's body.
Limited = make_dataclass(
    "Limited",
    [
        ("limit_waiting", int | None, _limit("Jobs in the queue; 100.")),
        ("limit_waiting_each", int | None, _limit("The same of a client; 100.")),
        ("limit_pixels", int | None, _limit("Of a picture; 16777216.")),
        ("limit_steps", int | None, _limit("Of a job; 1000.")),
        ("limit_images", int | None, _limit("Of a job; 100.")),
        ("limit_seconds", float | None, _limit("Of a job; 3600.")),
        ("limit_kept", int | None, _limit("Ended jobs; 1000.")),
        ("limit_body", str | None, option(None, "Of a request; 64MiB.", "BYTES", panel=_LIMITS)),
    ],
    namespace={"__doc__": "What the server takes at most."},
)
_ORDER = """
model models_dirs host port api_key cors allow_host state ray page log_json
device budget precision compute backend provider residency attention tiling prefer min_psnr ...
"""


@taking(Options, Wishes, Limited, order=_ORDER)
def serve(options: Options, wished: Mapping[str, Any], limited: Mapping[str, Any]) -> None:
    """Serve pictures over HTTP: A1111's API, OpenAI's, our own, and a page."""
    try:
        from ..server import running
    except ImportError as error:
        raise TightfitError(f"{_INSTALL} ({error.name} is missing)") from None
    door = _door(options, limited)
    listening = _listening(options, door)
    with listening, ExitStack() as ends:
        service = _service(options, wished, limited, ends)
        ends.callback(service.close)
        say(_greeting(service, door, listening))
        running.run(service, door, listening, as_json=options.log_json)


def _door(options: Options, limited: Mapping[str, Any]) -> Door:
    from ..server.guard import Door

    key = options.api_key if options.api_key is not None else os.environ.get(KEY, "")
    origins = tuple(origin.rstrip("/").lower() for origin in options.cors or ())
    open_to = {"--cors": origins, "--allow-host": options.allow_host or ()}
    if not key and (name := next((name for name, named in open_to.items() if "*" in named), None)):
        raise TightfitError(f"{name} '*' lets every page of the web paint here: give --api-key or {KEY} too")
    body = limited.get("limit_body")
    return Door(
        model=_named(options.model),
        api_key=key,
        host=options.host,
        hosts=tuple(name.lower() for name in options.allow_host or ()),
        origins=origins,
        page=options.page,
        body_bytes=Door.body_bytes if body is None else parse_bytes(body, "--limit-body"),
    )


def _named(model: str) -> str:
    """What a model is called by clients: a file without its folder and ending, others as they are."""
    path = Path(model).expanduser()
    return (path.name if path.is_dir() else path.stem) if path.exists() else model


def _listening(options: Options, door: Door) -> socket.socket:
    """A socket at the address. Raises TightfitError for one that is taken, or that others reach without a
    key."""
    host, port = options.host, options.port
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, OverflowError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise TightfitError(
            f"--host {host} --port {port} is no address here ({said}): name another"
        ) from None
    if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback and not door.api_key:
        raise TightfitError(f"others can reach {host}: give --api-key or {KEY}, or leave --host out")
    try:
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise TightfitError(
            f"{host} port {port} cannot be listened on ({os.strerror(error.errno or 0)}): "
            "stop what does, or give --port"
        ) from None


def _service(
    options: Options, wished: Mapping[str, Any], limited: Mapping[str, Any], ends: ExitStack
) -> Service:
    from ..asking import Shelves
    from ..machine.hardware import Hardware
    from ..models.hub import BUILT_IN, inspect, located
    from ..models.layouts.library import Kind
    from ..service import Limits, Service

    folder = options.state or state_folder()
    if folder is None:
        raise TightfitError("there is no home to keep jobs in: name a folder by --state")
    known = {field.name for field in dataclasses.fields(Limits)}
    limits = {name.removeprefix("limit_"): value for name, value in limited.items()}
    interrupts.tidily()
    place = located(options.model, options.models_dirs or ())
    named = {} if place in BUILT_IN else {_named(options.model): place}
    shelves = Shelves(options.models_dirs or (), named)
    inspect(place)  # fetched here, if it is to be: a request fetches nothing
    shelves.path(_named(options.model), Kind.MODEL)
    _check_room(Hardware.detect(options.device), Wishes(**wished))
    given = {
        "device": options.device,
        "folder": folder,
        "shelves": shelves,
        "limits": Limits(**{name: value for name, value in limits.items() if name in known}),
        **wished,
    }
    return _spreading(options, shelves, given, ends) if options.ray else Service(**given)


def _spreading(options: Options, shelves: Shelves, given: Mapping[str, Any], ends: ExitStack) -> Service:
    """Whose jobs are painted by the nodes of a Ray cluster."""
    from ..batch.nodes import RayCrew
    from ..batch.painting import Encoding
    from ..batch.serving import Spreading, foremost
    from ..batch.worker import Setup

    budget = given.get("budget")
    setup = Setup(
        encoding=Encoding("picture"),
        folder=str(Path.cwd()),
        models_dirs=tuple(str(Path(place).absolute()) for place in options.models_dirs or ()),
        device=options.device,
        budget=None if budget is None else f"{budget}",
        named=tuple(
            (name, str(Path(place).expanduser().absolute())) for name, place in shelves.models.items()
        ),
    )
    crew = ends.enter_context(RayCrew(options.ray or "auto", setup, (), lambda text: say(text, err=True)))
    abouts = [*crew.ready().values()]
    service = Spreading(crew, **given)
    machine = foremost(abouts, partial(_seconds, service, _named(options.model)))
    # What the page plans for, and models are listed by.
    service.hardware = replace(machine, name=f"{machine.name} (the fastest of {len(abouts)} nodes)")
    return service


def _seconds(service: Service, model: str, machine: Hardware) -> float:
    """Of a picture of the model's own size there; endless where it does not fit."""
    try:
        return service.models.planning(model, service.wishes, machine).plan(Request("")).predicted.seconds
    except TightfitError:
        return math.inf


def _check_room(hardware: Hardware, wishes: Wishes) -> None:
    """Raise TightfitError for a budget in which no job of any model would run."""
    from ..planner.estimate import holder
    from ..units import shown

    budget_bytes, context_bytes = wishes.budget, hardware.context_bytes
    if budget_bytes is not None and budget_bytes <= context_bytes:
        raise TightfitError(
            f"{holder(hardware)} alone takes {shown(context_bytes)}, and {shown(budget_bytes)} are given: "
            "give more"
        )


def _greeting(service: Service, door: Door, listening: socket.socket) -> str:
    """Where, which model, and in what it has to fit."""
    from ..planner.choose import budget_of
    from ..units import shown

    host, port = listening.getsockname()[:2]
    shown_host = f"[{host}]" if ":" in host else host
    budget = shown(budget_of(service.hardware, service.wishes))
    key = ", with a key" if door.api_key else ""
    where = f"http://{shown_host}:{port} on {service.hardware.name}"
    return f"tightfit serves {door.model} at {where}, in {budget}{key}"
