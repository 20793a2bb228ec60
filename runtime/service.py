"""One queue before all models of a machine: what long-lived doors stand on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from .asking import Shelves, request_of
from .conditions.input_pictures import open_picture
from .errors import TightfitError, first_line
from .events import Event, Result
from .jobs import Jobs, Order, Record, State
from .machine.hardware import Hardware
from .models.hub import inspect
from .models.layouts.library import Kind
from .passes import passes
from .pictures import save
from .pipeline import MANY, Pipeline
from .planner.plan import Plan
from .planner.wishes import Wishes
from .request import Job, Request, drawn
from .upscale import Upscaler

TRIES = 3
"""How often a job is begun that ends its process."""
_OPEN = 8  # models that stay known, loaded or not


@dataclass(frozen=True)
class Limits:
    """What one service takes. waiting: jobs in the queue, waiting_each: of one client. pixels: of a picture,
    in its last pass. steps, images: of a job. seconds: a job may run. kept: ended jobs that stay known."""

    waiting: int = 100
    waiting_each: int = 100
    pixels: int = 2**24
    steps: int = 1000
    images: int = 100
    seconds: float = 3600
    kept: int = 1000

    def check(self, request: Request) -> None:
        """Raise TightfitError for what is more, with the number. Of a job everything is known."""
        sizes = [(request.width or 0, request.height or 0)]
        if isinstance(request, Job):
            sizes = [(one.width, one.height) for one in passes(request)]
        steps = max(request.num_inference_steps or 0, request.hires_steps)
        pixels = max(width * height for width, height in sizes)
        given = {"pixels": pixels, "steps": steps, "images": request.num_images}
        for name, value in given.items():
            if value > (most := getattr(self, name)):
                raise TightfitError(f"{value} {name} are asked for, and {most} are taken here: ask for fewer")


class QueueFullError(TightfitError):
    """The queue takes nothing now. It may later."""


class Ticket:
    """A job that waits, runs, or has ended. Made by `Service.submit`. Safe to use from threads."""

    def __init__(self, record: Record, request: Request | None) -> None:
        self.record, self.request = record, request
        self.preview: Image.Image | None = None
        """The latest: of the latents, or of a picture that is painted."""
        self.plan: Plan | None = None
        self.wanted: State | None = None  # STOPPED or CANCELLED, once somebody asks for it
        self._events: list[Event] = []
        self._failure: BaseException | None = None
        self._result: Result | None = None
        self._news = threading.Condition()
        self._listeners: list[Callable[[], object]] = []

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def state(self) -> State:
        return self.record.state

    @property
    def cancelled(self) -> bool:
        return self.wanted is State.CANCELLED

    @property
    def images(self) -> list[Image.Image]:
        """The pictures so far. They are in memory for as long as somebody has this ticket."""
        return [event.picture for event in self._events if event.picture]

    @property
    def last(self) -> Event | None:
        """The newest event."""
        return self._events[-1] if self._events else None

    @property
    def eta_seconds(self) -> float | None:
        """Until it ends, by what is predicted and what is done; None while it waits."""
        if self.record.started is None or self.state.is_end or not self.plan:
            return None
        elapsed, done = time.time() - self.record.started, self.done
        return elapsed * (1 - done) / done if done > 0.05 else max(self.plan.predicted.seconds - elapsed, 0)

    @property
    def done(self) -> float:
        """The share of its steps that are taken, to 1."""
        last = self.last
        if self.state.is_end:
            return 1.0
        steps = [event for event in self._events if event.stage == "denoise"]
        return steps[-1].step / steps[-1].steps if last and steps else 0.0

    def listen(self, listener: Callable[[], object]) -> Callable[[], None]:
        """Call `listener`, in another thread, whenever something has changed. Returns what ends that."""
        self._listeners.append(listener)

        def end() -> None:
            with suppress(ValueError):
                self._listeners.remove(listener)

        return end

    def events(self) -> Iterator[Event]:
        """All events from the first, as they happen; the last has the result, and only the newest its
        preview. Raises what the run raised, and a TightfitError if it was cancelled."""
        place = 0
        while True:
            with self._news:
                self._news.wait_for(lambda at=place: len(self._events) > at or self.state.is_end)
                news = self._events[place:]
            if not news:
                break
            yield from news
            place += len(news)
        if self._failure:
            raise self._failure

    def seen(self, place: int) -> list[Event]:
        """The events that there are, from number `place`."""
        with self._news:
            return self._events[place:]

    def wait(self, timeout: float | None = None) -> State:
        """Wait for the end, or for so many seconds."""
        with self._news:
            self._news.wait_for(lambda: self.state.is_end, timeout)
        return self.state

    def result(self) -> Result:
        """Wait for the end. Raises as `events` does."""
        self.wait()
        if self._failure:
            raise self._failure
        assert self._result
        return self._result

    def cancel(self) -> None:
        """Do not begin it; if it runs, stop after the step it is at."""
        self.wanted = State.CANCELLED

    def stop(self) -> None:
        """As `cancel`, but keep the pictures that are painted."""
        self.wanted = self.wanted or State.STOPPED

    # What the service tells.

    def tell(self, event: Event) -> None:
        self.preview = event.picture or event.preview or self.preview
        self._result = event.result or self._result
        with self._news:
            if self._events:
                self._events[-1] = replace(self._events[-1], preview=None)
            self._events.append(event)
        self._changed()

    def become(self, record: Record, failure: BaseException | None = None) -> None:
        with self._news:
            self.record, self._failure = record, failure
        self._changed()

    def _changed(self) -> None:
        with self._news:
            self._news.notify_all()
        for listener in [*self._listeners]:
            listener()


class Service:
    """Runs jobs for any model one after another, in a thread of its own.

    What has more priority goes first, then whoever has waited longest since a job of theirs ran. Models stay
    open; on a device that has no room for the next, what the longest idle one has loaded is freed. Use as a
    context manager, or `close` it.
    """

    def __init__(
        self,
        *,
        device: str = "auto",
        folder: str | Path | None = None,
        shelves: Shelves | None = None,
        limits: Limits | None = None,
        **wishes: Any,
    ) -> None:
        """folder: where jobs are kept, so that those that wait, or run, are done after a restart; None keeps
        them in memory. shelves: what may be named; None is any path. wishes: fields of Wishes, of all models.

        Raises TightfitError for a device or wishes that there are not. No model is opened yet.
        """
        self.hardware, self.limits, self.shelves = Hardware.detect(device), limits or Limits(), shelves
        self._wishes = {"requests": MANY, **wishes}
        Wishes(**self._wishes)
        self.jobs = Jobs(Path(folder)) if folder is not None else None
        self._waiting: list[Ticket] = []
        self._served: dict[str, int] = {}  # of each client, when it was served last, counted in jobs
        self._running: Ticket | None = None
        self._pipelines: dict[Any, Pipeline | Upscaler] = {}
        self._desks: dict[Any, Pipeline] = {}
        self._closed = False
        self._news = threading.Condition()
        self._worker = threading.Thread(target=self._work, name="tightfit-service", daemon=True)
        self._resume()
        self._worker.start()

    # ---------------------------------------------------------------------------------------- what is asked

    def submit(self, model: str, asked: Request | Mapping[str, Any], **about: Any) -> Ticket:
        """Queue a request, or the options of one; `about` are the other fields of Order. Raises TightfitError
        for one that no model could do, and QueueFullError where the queue is, or the service closed."""
        if not isinstance(asked, Request):
            return self.queue(Order(model, asked, **about))
        if self.jobs:
            raise TightfitError("a service with a folder takes options by their names, not a Request")
        return self._queued(Record(Order(model, {}, **about)), asked.checked())

    def queue(self, order: Order) -> Ticket:
        """Queue what a client asks; see `submit`."""
        seeded = order
        if order.does == "paint":
            options = {**order.options}
            options["seed"] = drawn(None if options.get("seed") in (None, -1) else options["seed"])
            seeded = replace(order, options=options)
        return self._queued(Record(seeded), self._request(seeded))

    def ticket(self, id: str) -> Ticket | None:  # noqa: A002
        """Of a job that waits or runs."""
        with self._news:
            return next((ticket for ticket in self.active if ticket.id == id), None)

    def record(self, id: str) -> Record | None:  # noqa: A002
        """Of any job that is known."""
        ticket = self.ticket(id)
        return ticket.record if ticket else self.jobs.get(id) if self.jobs else None

    @property
    def active(self) -> list[Ticket]:
        """The job that runs, then those that wait, in the order they came."""
        with self._news:
            return [*([self._running] if self._running else []), *self._waiting]

    @property
    def running(self) -> Ticket | None:
        return self._running

    def plans(self, model: str, asked: Request | Mapping[str, Any], **wishes: Any) -> list[Plan]:
        """Every way to run it here, the one that will be taken first, also while another job runs. Raises
        TightfitError if none fits."""
        request = asked if isinstance(asked, Request) else request_of(asked, self.shelves)
        return self._desk(model, wishes).plans(request)

    def loaded(self) -> dict[str, int]:
        """Bytes that each model holds on the device now."""
        return {
            key[0]: pipeline.loaded.held()
            for key, pipeline in [*self._pipelines.items()]
            if isinstance(pipeline, Pipeline)
        }

    def close(self) -> None:
        """Take no more jobs, and free everything. What waits or runs is cancelled, or, in a folder, done
        after the next start."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        if self._worker.is_alive():
            self._worker.join()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------- the queue

    def _queued(self, record: Record, request: Request | None) -> Ticket:
        ticket = Ticket(record, request)
        with self._news:
            if self._closed:
                raise QueueFullError("the service is closed: no more requests are taken")
            clients = [waiting.record.order.client for waiting in self._waiting]
            if len(clients) >= self.limits.waiting:
                raise QueueFullError(f"{self.limits.waiting} requests wait already: try again later")
            if clients.count(record.order.client) >= self.limits.waiting_each:
                raise QueueFullError(
                    f"{self.limits.waiting_each} requests of yours wait already: try again later"
                )
            if self.jobs:
                self.jobs.add(record)
            self._waiting.append(ticket)
            self._news.notify_all()
        return ticket

    def _request(self, order: Order) -> Request | None:
        """What the order asks, checked as far as can be without its model."""
        if order.does == "upscale":
            if self.shelves:
                self.shelves.path(order.model, Kind.UPSCALER)
            open_picture(order.options.get("image"))
            return None
        Wishes(**{**self._wishes, **order.wishes})
        request = request_of(order.options, self.shelves)
        self.limits.check(request)
        return request

    def _resume(self) -> None:
        """Queue what an earlier process left."""
        for record in self.jobs.unfinished() if self.jobs else ():
            ticket = Ticket(replace(record, state=State.WAITING), None)
            if record.tries >= TRIES:
                said = f"tightfit ended {record.tries} times while it ran"
                self._end(ticket, State.FAILED, TightfitError(f"{said}: ask for less, or look into its log"))
                continue
            try:
                ticket.request = self._request(record.order)
            except TightfitError as error:
                self._end(ticket, State.FAILED, error)
                continue
            self._waiting.append(ticket)

    def _next(self) -> Ticket | None:
        """The job to run now; None when closed. Waits for one."""
        with self._news:
            self._news.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            ticket = min(self._waiting, key=self._order)  # the first of those that are equal
            self._waiting.remove(ticket)
            client = ticket.record.order.client
            self._served[client] = max(self._served.values(), default=0) + 1
            still = {waiting.record.order.client for waiting in self._waiting} | {client}
            self._served = {name: turn for name, turn in self._served.items() if name in still}
            self._running = ticket
            return ticket

    def _order(self, ticket: Ticket) -> tuple[int, int]:
        order = ticket.record.order
        return -order.priority, self._served.get(order.client, 0)

    # ---------------------------------------------------------------------------------------- the worker

    def _work(self) -> None:
        try:
            while ticket := self._next():
                try:
                    self._run(ticket)
                except BaseException as error:  # whoever submitted it is told; the next is not theirs
                    self._end(ticket, State.FAILED, error)
                finally:
                    self._running = None
        finally:
            with self._news:
                left, self._waiting = self._waiting, []
            for ticket in left:
                self._end(ticket, State.CANCELLED, _cancelled(), keep=self.jobs is not None)
            for pipeline in (*self._pipelines.values(), *self._desks.values()):
                pipeline.close()
            if self.jobs:
                self.jobs.close()

    def _run(self, ticket: Ticket) -> None:
        if ticket.wanted or self._closed:
            self._end(ticket, State.CANCELLED, _cancelled(), keep=self._closed and self.jobs is not None)
            return
        record = ticket.record
        begun = replace(record, state=State.RUNNING, started=time.time(), tries=record.tries + 1, pictures=())
        self._become(ticket, begun)
        self._free_others((record.order.model, _key(record.order.wishes)))
        if record.order.does == "upscale":
            self._enlarge(ticket)
        else:
            self._paint(ticket)

    def _paint(self, ticket: Ticket) -> None:
        order, request = ticket.record.order, ticket.request
        assert request
        pipeline = self._pipeline(order.model, order.wishes)
        job = request.resolve(pipeline.spec)
        self.limits.check(job)
        ticket.plan = pipeline.plans(job)[0]
        end_by = time.monotonic() + self.limits.seconds
        with closing(pipeline.run(job, order.preview_every)) as events:
            advance: Callable[[], Event] = lambda: next(events)  # noqa: E731
            while True:
                try:
                    event = advance()
                except KeyboardInterrupt:  # thrown below: all that is painted has been told
                    self._end(ticket, State.STOPPED)
                    return
                advance = lambda: next(events)  # noqa: E731
                if event.picture:
                    self._keep(ticket, event.picture)
                ticket.tell(event)
                if event.result:
                    self._end(ticket, State.DONE, summary=summary_of(event.result))
                    return
                if ticket.cancelled or self._closed:
                    keep = self._closed and self.jobs is not None
                    self._end(ticket, State.CANCELLED, _cancelled(), keep=keep)
                    return
                if time.monotonic() > end_by:
                    raise TightfitError(
                        f"it ran for more than {self.limits.seconds:g} seconds, which are allowed here: "
                        "ask for less"
                    )
                if ticket.wanted is State.STOPPED:
                    advance = lambda: events.throw(KeyboardInterrupt())  # noqa: E731

    def _enlarge(self, ticket: Ticket) -> None:
        order = ticket.record.order
        key = order.model, _key(order.wishes)
        if key not in self._pipelines:
            path = self.shelves.path(order.model, Kind.UPSCALER) if self.shelves else order.model
            self._pipelines[key] = Upscaler(path, hardware=self.hardware, **{**self._wishes, **order.wishes})
        upscaler = self._pipelines[key]
        assert isinstance(upscaler, Upscaler)
        enlarged = upscaler.enlarge(order.options["image"], order.options.get("scale"))
        ticket.plan = enlarged.plan
        self._keep(ticket, enlarged.image)
        ticket.tell(Event("upscale", 1, 1, picture=enlarged.image, notices=enlarged.notices))
        measured = asdict(enlarged.measured)
        self._end(ticket, State.DONE, summary={"stages": [{"upscale": measured}]})

    def _keep(self, ticket: Ticket, image: Image.Image) -> None:
        if self.jobs:
            pictures = ticket.record.pictures
            path = save(image, self.jobs.pictures / f"{ticket.id}-{len(pictures) + 1}.png")
            ticket.record = replace(ticket.record, pictures=(*pictures, path))

    def _end(
        self,
        ticket: Ticket,
        state: State,
        failure: BaseException | None = None,
        *,
        keep: bool = False,
        summary: Mapping[str, Any] | None = None,
    ) -> None:
        """`keep`: in the folder it stays as it is, to be done after the next start."""
        error = (
            (str(failure) if isinstance(failure, TightfitError) else first_line(failure)) if failure else ""
        )
        record = replace(
            ticket.record,
            state=state,
            ended=time.time(),
            error=error,
            summary=summary or ticket.record.summary,
        )
        if self.jobs and not keep:
            try:
                self.jobs.change(record)
                self.jobs.forget(self.limits.kept)
            except TightfitError as broken:  # the client is told all the same
                failure = failure or broken
                record = replace(record, error=record.error or str(broken))
        ticket.become(record, failure)

    def _become(self, ticket: Ticket, record: Record) -> None:
        if self.jobs:
            self.jobs.change(record)
        ticket.become(record)

    def _pipeline(self, model: str, wishes: Mapping[str, Any]) -> Pipeline:
        key = model, _key(wishes)
        pipeline = self._pipelines.pop(key, None)
        if not isinstance(pipeline, Pipeline):
            pipeline = self._opened(model, wishes)
        self._pipelines[key] = pipeline  # the last is the one that ran last
        return pipeline

    def _free_others(self, key: Any) -> None:
        """Close the models that were idle for longest, where there are many."""
        idle = [other for other in self._pipelines if other != key]
        for other in idle[: max(0, len(idle) + 1 - _OPEN)]:
            self._pipelines.pop(other).close()

    def _desk(self, model: str, wishes: Mapping[str, Any]) -> Pipeline:
        """A pipeline that plans, and runs nothing: that of a job may be at a step for seconds."""
        key = model, _key(wishes)
        with self._news:
            desk = self._desks.pop(key, None)
        desk = desk or self._opened(model, wishes)
        with self._news:
            self._desks[key] = desk
            for other in [*self._desks][: max(0, len(self._desks) - _OPEN)]:
                self._desks.pop(other)
        return desk

    def _opened(self, model: str, wishes: Mapping[str, Any]) -> Pipeline:
        path = self.shelves.path(model, Kind.MODEL) if self.shelves else model
        return Pipeline(
            inspect(path, local_files_only=self.shelves is not None),
            self.hardware,
            Wishes(**{**self._wishes, **wishes}),
        )


def _cancelled() -> TightfitError:
    return TightfitError("the request was cancelled")


def _key(wishes: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(wishes.items()))


def summary_of(result: Result) -> dict[str, Any]:
    """What is kept of a run besides its pictures, as JSON."""
    return {
        "request": result.request.to_json(),
        "plan": [one.plan.summary() for one in result.passes],
        "seconds": result.seconds,
        "predicted_bytes": result.predicted_bytes,
        "peak_bytes": result.peak_bytes,
        "process_bytes": result.process_bytes,
        "stages": [{name: asdict(m) for name, m in one.stages.items()} for one in result.passes],
        "notices": list(result.notices),
        "parameters": [image.info.get("parameters") for image in result.images],
    }
