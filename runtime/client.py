"""A pipeline elsewhere: the same calls as of one that is loaded here, sent to `tightfit serve`."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from .asking import PICTURES
from .conditions.input_pictures import open_picture
from .errors import TightfitError
from .events import Event
from .files import open_regular
from .planner.plan import Plan

if TYPE_CHECKING:
    import httpx

_API = "/v1/tightfit"
_ENDS = ("done", "failed", "cancelled", "stopped", "postponed")
_TRIES = 3  # of a stream of events that breaks
_MOST_BYTES = 2**30
_SECONDS = 60.0  # without an answer; a job may take longer, as its events come all the while
_LOSSLESS = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # modes that a PNG has


@dataclass(frozen=True)
class Painted:
    """A job that is done: its pictures, each with its settings in `info["parameters"]`; what is known of the
    run, as `summary`: the request as it was resolved, measured bytes and seconds; and what to know."""

    id: str
    images: tuple[Image.Image, ...]
    summary: Mapping[str, Any]
    notices: tuple[str, ...]


def connect(
    url: str = "http://127.0.0.1:7860",
    api_key: str | None = None,
    *,
    model: str | None = None,
    **wishes: Any,
) -> Remote:
    """The pipeline of a `tightfit serve` that answers at `url`.

    model: one that the server knows; None is the one that it serves. wishes: as of `load`, by which each
    request is planned there. Raises TightfitError where nothing answers, or not to this key.
    """
    remote = Remote(url, api_key, {**({"model": model} if model else {}), **wishes})
    remote.info()
    return remote


class Remote:
    """Made by `connect`. Use as a context manager, or `close` it. Safe to use from threads."""

    def __init__(self, url: str, api_key: str | None, always: Mapping[str, Any]) -> None:
        try:
            import httpx
        except ImportError:
            raise TightfitError(
                "httpx is not installed, which calls the server: pip install 'tightfit[serve]'"
            ) from None
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self._always = dict(always)
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=_SECONDS)
        except (httpx.InvalidURL, UnicodeError) as error:
            raise TightfitError(f"{url[:200]} is no address ({error}): give http://127.0.0.1:7860") from None

    def __call__(self, prompt: str, **options: Any) -> Image.Image | list[Image.Image]:
        """Paint `prompt`: a picture, or a list of them with num_images above one. Options are those of a
        pipeline; pictures are files, PIL images or arrays, and everything else is named as at the server."""
        images = self.generate(prompt, **options).images
        return images[0] if len(images) == 1 else list(images)

    def generate(
        self, prompt: str, on_event: Callable[[Event], object] | None = None, **options: Any
    ) -> Painted:
        """Paint to the end and return what is known of it; `on_event` is told of the steps."""
        job: Mapping[str, Any] = {}
        for job in self._jobs({"prompt": prompt, **options}):
            if on_event:
                on_event(_event(job))
        images = tuple(self._picture(place) for place in job["pictures"])
        return Painted(job["id"], images, job["summary"], tuple(job["notices"]))

    def run(self, prompt: str, preview_every: int = 0, **options: Any) -> Iterator[Event]:
        """The job's events, as they come, the newest where several came at once. Closing the iterator
        cancels the job."""
        for job in self._jobs({"prompt": prompt, "preview_every": preview_every, **options}):
            yield _event(job)

    def plans(self, prompt: str = "", hardware: str | None = None, **options: Any) -> list[Plan]:
        """Every way to run it there, or on a card of profiles/, the one that will be taken first; of several
        passes, the first. Raises TightfitError if none fits."""
        more = {"hardware": hardware} if hardware else {}
        answer = self._asked(
            "POST", "plan", json=_sent({**self._always, **more, "prompt": prompt, **options})
        )
        if not answer["fits"]:
            raise TightfitError(answer["error"])
        return [Plan.from_json(json.dumps(_whole(plan))) for plan in answer["passes"][0]["plans"]]

    def models(self) -> list[dict[str, Any]]:
        """What can be named there: of each file what it is, and what it would run as."""
        return self._asked("GET", "models", timeout=None)["models"]

    def info(self) -> dict[str, Any]:
        """The machine there, what is free, and what it serves."""
        return self._asked("GET", "info")

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _jobs(self, asked: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """The job, each time something of it has changed; cancelled where nobody waits for the next. Raises
        TightfitError if it fails."""
        place = f"jobs/{self._asked('POST', 'jobs', json=_sent({**self._always, **asked}))['id']}"
        has_ended = False
        try:
            for job in self._changes(place):
                has_ended = job["state"] in _ENDS
                if has_ended and job["state"] != "done":
                    raise TightfitError(job["error"] or f"the job was {job['state']}")
                yield job
        finally:
            if not has_ended:
                self._asked("DELETE", place)

    def _changes(self, place: str) -> Iterator[Mapping[str, Any]]:
        """Of a stream that breaks the rest is asked for anew: each event is the whole job."""
        import httpx

        for tries in range(_TRIES, 0, -1):
            try:
                with (
                    self._explained(),
                    self._http.stream("GET", f"{_API}/{place}/events", params={"previews": "true"}) as answer,
                ):
                    if answer.is_error:
                        answer.read()
                    _check(answer)
                    for line in answer.iter_lines():
                        if line.startswith("data: "):
                            job = json.loads(line.removeprefix("data: "))
                            yield job
                            if job["state"] in _ENDS:
                                return
            except TightfitError as error:
                if tries == 1 or not isinstance(error.__cause__, httpx.TransportError):
                    raise
        raise TightfitError(f"{self.url} ends its events early: is it closing?")

    def _picture(self, place: str) -> Image.Image:
        with self._explained():
            answer = _check(self._http.get(place))
        image = Image.open(BytesIO(answer.content), formats=["PNG"])
        image.load()
        return image

    def _asked(self, method: str, place: str, **about: Any) -> dict[str, Any]:
        with self._explained():
            return _check(self._http.request(method, f"{_API}/{place}", **about)).json()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except (httpx.HTTPError, ValueError) as error:
            said = str(error) or type(error).__name__
            raise TightfitError(
                f"{self.url} does not answer as tightfit does ({said}): start tightfit serve there"
            ) from error


def _check(answer: httpx.Response) -> httpx.Response:
    """Raises TightfitError with what the server says."""
    if answer.is_success:
        return answer
    try:
        said = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        said = f"status {answer.status_code}"
    raise TightfitError(str(said))


def _event(job: Mapping[str, Any]) -> Event:
    return Event(
        job["stage"] or job["state"],
        job["step"],
        job["steps"],
        job["image"],
        preview=_opened(job["preview"]) if job["preview"] else None,
        notices=tuple(job["notices"]),
    )


def _opened(data_url: str) -> Image.Image:
    image = Image.open(BytesIO(base64.b64decode(data_url.partition(",")[2])), formats=["JPEG"])
    image.load()
    return image


def _whole(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan as `Plan` has it, without what is said beside."""
    return {name: value for name, value in plan.items() if name not in ("summary", "wishes")}


def _sent(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The options as JSON."""
    sent = {name: value for name, value in asked.items() if value is not None}
    sent |= {name: _picture_sent(sent[name]) for name in PICTURES if name in sent}
    try:
        json.dumps(sent, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TightfitError(
            f"this cannot be sent to a server ({error}): name it as the server does"
        ) from None
    return sent


def _picture_sent(given: Any) -> Any:
    """A file as it is, anything else as a PNG; or a list of them."""
    if isinstance(given, list | tuple):
        return [_picture_sent(one) for one in given]
    if isinstance(given, str | Path):
        try:
            with open_regular(Path(given), _MOST_BYTES) as stream:
                return base64.b64encode(stream.read()).decode()
        except OSError as error:
            raise TightfitError(f"{given} cannot be read ({error.strerror}): name a picture") from None
    image = ImageOps.exif_transpose(given) if isinstance(given, Image.Image) else _of_array(given)
    if image.mode not in _LOSSLESS:
        image = open_picture(image).image
    stream = BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _of_array(given: Any) -> Image.Image:
    """An array as pipelines take it, with its transparency. Raises TightfitError."""
    picture = open_picture(given)
    if picture.alpha is None:
        return picture.image
    colours = np.asarray(given)[..., :3]  # not on white, as they are in `picture`
    if np.issubdtype(colours.dtype, np.floating):
        colours = (colours * 255).round().astype(np.uint8)
    return Image.fromarray(np.dstack([colours.reshape(picture.pixels.shape), picture.alpha]))
