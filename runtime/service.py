"""One queue before all models of a machine: what long-lived doors stand on."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from .asking import Shelves, request_of, seeded
from .conditions.input_pictures import open_picture
from .errors import TightfitError, first_line
from .events import Event, Result
from .jobs import Jobs, Order, Record, Remembered, State, UnkeptError
from .machine.hardware import Hardware
from .models.layouts.library import Kind
from .open_models import ASKABLE, OpenModels
from .passes import passes
from .pictures import PARAMETERS, save
from .pipeline import MANY, Pipeline, Planned
from .planner.choose import refuse_impossible
from .planner.plan import Plan
from .planner.wishes import Wishes
from .request import Job, Request
from .ticket import Ticket as Ticket

TRIES = 3
"""How often a job is begun that ends its process."""
_GIVEN = 4  # pictures of the largest size that an order may bring: one, its mask, and two to follow
_AGAIN_SECONDS = 5.0  # until what could not be written is tried again
T = TypeVar("T")
_log = logging.getLogger("tightfit.service")


@dataclass(frozen=True)
class Limits:
    """What one service takes. waiting: jobs in the queue, waiting_each: of one client. pixels: of a picture,
    in its last pass; all that an order gives may have four times as many. steps, images: of a job.
    characters: of all texts of an order. seconds: a job may run. kept: ended jobs that stay known."""

    waiting: int = 100
    waiting_each: int = 100
    pixels: int = 2**24
    steps: int = 1000
    images: int = 100
    characters: int = 2**18
    seconds: float = 3600
    kept: int = 1000

    def check(self, request: Request) -> None:
        """Raise TightfitError for what is more, with the number. Of a job everything is known."""
        sizes = [(request.width or 0, request.height or 0)]
        if isinstance(request, Job):
            sizes = [(one.width, one.height) for one in passes(request)]
        steps = max(request.num_inference_steps or 0, request.hires_steps)
        pixels = max(width * height for width, height in sizes)
        self.check_counts(pixels=pixels, steps=steps, images=request.num_images)

    def check_order(self, order: Order) -> None:
        """The same of what an order gives, before anything is made of it."""
        self.check_counts(characters=order.characters)
        if order.pixels > (most := _GIVEN * self.pixels):
            raise TightfitError(
                f"pictures of {order.pixels} pixels are given, and {most} are taken here: make them smaller"
            )

    def check_counts(self, **counts: float) -> None:
        """The same of counts by their names here."""
        for name, count in counts.items():
            if count > (most := getattr(self, name)):
                raise TightfitError(
                    f"{count:.0f} {name} are asked for, and {most} are taken here: ask for fewer"
                )


class QueueFullError(TightfitError):
    """The queue takes nothing now. It may later."""


def _privately(method: Callable[..., T]) -> Callable[..., T]:
    """What it raises says no path, where clients may give names alone."""

    @wraps(method)
    def called(self: Service, *given: Any, **named: Any) -> T:
        try:
            return method(self, *given, **named)
        except TightfitError as error:
            error.args = (self.bare(str(error)),)
            raise

    return called


class Service:
    """Runs jobs for any model one after another, in a thread of its own.

    Whoever has waited longest since a job of theirs ran is next; of their jobs, what has more priority.
    Models stay open; on a device that has no room for the next, what the longest idle one has loaded is
    freed. Use as a context manager, or `close` it.
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
        them in memory, and their pictures as long as their tickets. shelves: what may be named; None is any
        path. wishes: fields of Wishes, of all models.

        Raises TightfitError for a device or wishes that there are not. No model is opened yet.
        """
        if unknown := next((name for name in wishes if name not in ASKABLE), None):
            raise TightfitError(f"unknown option '{unknown}': choose {', '.join(ASKABLE)}")
        self.hardware, self.limits, self.shelves = Hardware.detect(device), limits or Limits(), shelves
        self.models = OpenModels(self.hardware, shelves, Wishes(**{"requests": MANY, **wishes}))
        self.folder = Path(folder) if folder is not None else None
        self.jobs = Jobs(self.folder) if self.folder else Remembered()
        self.problem = ""
        """Why the folder cannot be written now, in a line."""
        self._waiting: list[Ticket] = []
        self._coming: list[str] = []  # the clients of jobs that are being written
        self._unwritten: dict[str, Record] = {}  # for want of room, or of a lock
        self._served: dict[str, int] = {}  # of each client, when it was served last, counted in jobs
        self._running: Ticket | None = None
        self._watchers: list[Callable[[Ticket], object]] = []
        self._closed = self._unloading = False
        self._news = threading.Condition()  # never held while a file is written, or a model is freed
        self._writing = threading.RLock()  # of the folder; with `_news` never both
        self._worker = threading.Thread(target=self._work, name="tightfit-service", daemon=True)
        try:
            self._resume()
        except BaseException:
            self.jobs.close()
            raise
        self._worker.start()

    # ---------------------------------------------------------------------------------------- what is asked

    def submit(self, model: str, asked: Request | Mapping[str, Any], **about: Any) -> Ticket:
        """Queue a request, or the options of one; `about` are the other fields of Order. Raises TightfitError
        for one that no model could do, and QueueFullError where the queue is, or the service closed."""
        if not isinstance(asked, Request):
            return self.queue(Order(model, asked, **about))
        if self.folder:
            raise TightfitError("a service with a folder takes options by their names, not a Request")
        order = Order(model, {}, **about)
        order.check()
        self.models.wished(order.wishes)
        return self._queued(Record(order), asked.checked())

    @_privately
    def queue(self, order: Order) -> Ticket:
        """Queue what a client asks; see `submit`."""
        order.check()
        self.limits.check_order(order)
        if order.does == "paint":
            order = replace(order, options=seeded(order.options))
        return self._queued(Record(order), self._request(order))

    def ticket(self, id: str) -> Ticket | None:  # noqa: A002
        """Of a job that waits or runs."""
        return next((ticket for ticket in self.active if ticket.id == id), None)

    def record(self, id: str) -> Record | None:  # noqa: A002
        """Of any job that is known."""
        ticket = self.ticket(id)
        return ticket.record if ticket else self._unwritten.get(id) or self.jobs.get(id)

    def records(self, count: int = 100, before: str = "") -> list[Record]:
        """The newest jobs first, or those older than the job `before`."""
        return self.jobs.latest(count, before)

    @property
    def active(self) -> list[Ticket]:
        """The jobs that run, then those that wait, in the order they came. Waits for no lock."""
        waiting, running = [*self._waiting], self.at_work  # in this order: a job is in one of them, or both
        others = [ticket for ticket in waiting if ticket not in running and not ticket.state.is_end]
        return [*running, *others]

    @property
    def at_work(self) -> list[Ticket]:
        """The jobs that run: here one."""
        running = self._running
        return [running] if running and not running.state.is_end else []

    @property
    def running(self) -> Ticket | None:
        """The job that runs; the first of several."""
        return next(iter(self.at_work), None)

    def running_of(self, client: str) -> Ticket | None:
        """The client's, or else the first."""
        theirs = (ticket for ticket in self.at_work if ticket.record.order.client == client)
        return next(theirs, self.running)

    @_privately
    def plans(self, model: str, asked: Request | Mapping[str, Any], **wishes: Any) -> list[Plan]:
        """Every way to run it here, the one that will be taken first, also while another job runs. Raises
        TightfitError if none fits."""
        pipeline, job = self._planning(model, asked, wishes)
        return pipeline.plans(job)

    @_privately
    def planned(
        self,
        model: str,
        asked: Request | Mapping[str, Any],
        hardware: Hardware | None = None,
        is_wanted: Callable[[], bool] = lambda: True,
        **wishes: Any,
    ) -> list[Planned]:
        """Each pass with every way to run it, here or on other hardware, also where none fits. Raises
        TightfitError for what cannot be asked, and soon after `is_wanted` says no."""
        pipeline, job = self._planning(model, asked, wishes, hardware)
        return pipeline.planned(job, is_wanted)

    def _planning(
        self,
        model: str,
        asked: Request | Mapping[str, Any],
        wishes: Mapping[str, Any],
        hardware: Hardware | None = None,
    ) -> tuple[Pipeline, Job]:
        """What plans it, and what is asked, within the limits."""
        if not isinstance(asked, Request):
            self.limits.check_order(Order(model, asked, wishes))
            asked = request_of(asked, self.shelves, model=partial(self.models.spec, model))
        self.limits.check(asked)
        pipeline = self.models.planning(model, self.models.wished(wishes), hardware)
        job = asked.resolve(pipeline.spec)
        self.limits.check(job)
        return pipeline, job

    @property
    def wishes(self) -> Wishes:
        """Of all models, but for what a job wishes itself."""
        return self.models.wishes

    @property
    def is_open(self) -> bool:
        """Whether it takes jobs, and does them."""
        return not self._closed and self._worker.is_alive()

    def watch(self, watcher: Callable[[Ticket], object]) -> None:
        """Have `watcher` called with each job, those that there are and those to come, before they run."""
        with self._news:
            self._watchers.append(watcher)
            for ticket in self.active:
                self._show(ticket, [watcher])

    def loaded(self) -> dict[str, int]:
        """Bytes that each model holds on the device now."""
        return self.models.held()

    def unload(self) -> None:
        """Free what models hold on the device, before the next job. It is loaded again when it is needed."""
        with self._news:
            self._unloading = True
            self._news.notify_all()

    def close(self) -> None:
        """Take no more jobs, and free everything. What waits or runs is cancelled, or, in a folder,
        postponed: done after the next start."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        if self._worker.is_alive() and threading.current_thread() is not self._worker:
            self._worker.join()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------- the queue

    def _queued(self, record: Record, request: Request | None) -> Ticket:
        ticket = Ticket(record, request, self._withdraw)
        with self._place_for(record.order.client):
            try:
                self.jobs.add(record)  # its pictures too, which takes a while
            except UnkeptError as error:
                raise QueueFullError(str(error)) from error
            self._shelve(ticket)
            with self._news:
                self._waiting.append(ticket)
                self._news.notify_all()
                self._show(ticket, self._watchers)
        return ticket

    def _shelve(self, ticket: Ticket) -> None:
        """Its pictures wait as files, where there is a folder: many would take all memory."""
        if self.folder and ticket.record.order.pixels:
            ticket.record, ticket.request = replace(ticket.record, order=ticket.record.order.bare), None

    def _asked(self, ticket: Ticket) -> tuple[Order, Request | None]:
        """What it asks, with its pictures, wherever they wait."""
        if ticket.request or not isinstance(self.jobs, Jobs):
            return ticket.record.order, ticket.request
        record, problem = self.jobs.complete(ticket.record)
        if problem:
            raise TightfitError(problem)
        return record.order, self._request(record.order)

    @staticmethod
    def _show(ticket: Ticket, watchers: Sequence[Callable[[Ticket], object]]) -> None:
        for watcher in watchers:
            try:
                watcher(ticket)
            except Exception:  # no reason to refuse the job, which is queued
                _log.exception("a watcher failed", extra={"job": ticket.id})

    @contextmanager
    def _place_for(self, client: str) -> Iterator[None]:
        """A place in the queue, until the job is in it. Raises QueueFullError."""
        with self._news:
            if self._closed:
                raise QueueFullError("the service is closed: no more requests are taken")
            clients = [*self._coming, *(waiting.record.order.client for waiting in self._waiting)]
            if len(clients) >= self.limits.waiting:
                raise QueueFullError(f"{self.limits.waiting} requests wait already: try again later")
            if clients.count(client) >= self.limits.waiting_each:
                raise QueueFullError(
                    f"{self.limits.waiting_each} requests of yours wait already: try again later"
                )
            self._coming.append(client)
        try:
            yield
        finally:
            with self._news:
                self._coming.remove(client)
                self._news.notify_all()

    def _request(self, order: Order) -> Request | None:
        """What the order asks, checked as far as can be without its model; where it says how to run it, by
        that too."""
        wishes = self.models.wished(order.wishes)
        if order.does == "upscale":
            self._check_upscaling(order)
            return None
        self.models.place(order.model, Kind.MODEL)
        previews = {"preview_every": order.preview_every} if order.preview_every else {}
        read = partial(self.models.spec, order.model)
        request = request_of({**order.options, **previews}, self.shelves, model=read)
        self.limits.check(request)
        if order.wishes:
            self._check_possible(order, request, wishes)
        return request

    def _check_possible(self, order: Order, request: Request, wishes: Wishes) -> None:
        """Raise TightfitError for what runs nowhere here, whatever the memory."""
        refuse_impossible(self.hardware, request.resolve(self.models.spec(order.model)), wishes)

    def _check_upscaling(self, order: Order) -> None:
        if unknown := next((name for name in order.options if name not in ("image", "scale")), None):
            raise TightfitError(f"unknown option '{unknown}': an upscaler takes image and scale")
        image = order.options.get("image")
        if image is None or (self.shelves and not isinstance(image, Image.Image)):
            raise TightfitError("an upscaler's image must be a picture itself, not the name of one")
        self.models.place(order.model, Kind.UPSCALER)
        picture = open_picture(image)
        self.limits.check_counts(pixels=picture.width * picture.height)

    def _resume(self) -> None:
        """Queue what an earlier process left."""
        for record, problem in self.jobs.unfinished():
            ticket = Ticket(replace(record, state=State.WAITING), None, self._withdraw)
            if record.tries >= TRIES:
                problem = (
                    f"tightfit ended {record.tries} times while it ran: ask for less, or look into its log"
                )
            try:
                if problem:
                    raise TightfitError(problem)
                ticket.request = self._request(record.order)
            except (
                Exception
            ) as error:  # such as an order of another version; the others are done all the same
                self._end(ticket, State.FAILED, error)
            else:
                self._shelve(ticket)
                self._waiting.append(ticket)

    def _next(self) -> Ticket | None:
        """The job to run now; None when closed. Waits for one."""
        while True:
            with self._news:
                woken = lambda: self._waiting or self._closed or self._unloading  # noqa: E731
                self._news.wait_for(woken, _AGAIN_SECONDS)
                unloading, self._unloading = self._unloading, False
                if not unloading and self._closed:
                    return None
                if not unloading and self._waiting:
                    self._running = self._first(self._waiting)  # before it waits no more: see `active`
                    return self._taken(self._running)
            if unloading:
                self.models.free()
            else:
                self._write_again()

    def _first(self, waiting: Sequence[Ticket]) -> Ticket:
        """Of these the one whose turn it is."""
        clients = [one.record.order.client for one in waiting]
        client = min(clients, key=lambda name: self._served.get(name, 0))  # the first of equals
        theirs = (one for one in waiting if one.record.order.client == client)
        return max(theirs, key=lambda one: one.record.order.priority)

    def _taken(self, ticket: Ticket) -> Ticket:
        """Out of the queue."""
        still = {waiting.record.order.client for waiting in self._waiting}
        latest = max(self._served.values(), default=0)
        self._served = {name: turn for name, turn in self._served.items() if name in still}
        self._served[ticket.record.order.client] = latest + 1
        self._waiting.remove(ticket)
        return ticket

    def _withdraw(self, ticket: Ticket) -> None:
        """End a job that waits. One that runs is ended by the worker, after the step it is at."""
        if ticket in self._waiting:  # if its turn has come meanwhile, the worker finds it ended
            self._end(ticket, State.CANCELLED, _cancelled())
        with self._news:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            self._news.notify_all()

    def _pause(self, ticket: Ticket, error: TightfitError) -> None:
        """Until what could not be written for it is tried again, or there is no more need."""
        self.problem = self.bare(str(error))
        _log.warning("%s", self.problem, extra={"job": ticket.id})
        with self._news:
            over = lambda: self._closed or ticket.cancelled or ticket.ending  # noqa: E731
            self._news.wait_for(over, _AGAIN_SECONDS)
        self._write_again()  # which says whether the folder can be written now

    # ---------------------------------------------------------------------------------------- the worker

    def _work(self) -> None:
        try:
            while ticket := self._next():
                with self._told(ticket):
                    self._begin(ticket)
                    with self._limited(ticket):
                        self._run(ticket)
        finally:
            self._shut()

    def _shut(self) -> None:
        """Free everything, and end what waits."""
        with self._news:
            self._closed = True
            self._news.wait_for(lambda: not self._coming)
            left, self._waiting = self._waiting, []
        try:
            for ticket in left:
                self._give_up(ticket)
            self.models.close()
        finally:
            with self._writing:
                self._write_again()
                self.jobs.close()

    @contextmanager
    def _limited(self, ticket: Ticket) -> Iterator[None]:
        """It is over in time, though the step it is at may not be."""
        watch = threading.Timer(min(self.limits.seconds, threading.TIMEOUT_MAX), self._late, (ticket,))
        watch.daemon = True
        watch.start()
        try:
            yield
        finally:
            watch.cancel()

    def _late(self, ticket: Ticket) -> None:
        said = f"it ran for more than {self.limits.seconds:g} seconds, which are allowed here: "
        self._end(ticket, State.FAILED, TightfitError(said + (self.problem or "ask for less")))
        with self._news:
            self._news.notify_all()

    @contextmanager
    def _told(self, ticket: Ticket) -> Iterator[None]:
        """One job: whatever it raises is its own."""
        try:
            yield
        except OverError:
            pass
        except BaseException as error:  # whoever submitted it is told; the next is not theirs
            if not isinstance(error, TightfitError):
                _log.exception("the job failed", extra={"job": ticket.id})
            self._end(ticket, State.CANCELLED if ticket.cancelled else State.FAILED, error)
        finally:
            self._running = None

    def _begin(self, ticket: Ticket) -> None:
        """Write that it runs; where that cannot be done now, it waits, and all others behind it."""
        begun = replace(ticket.record, state=State.RUNNING, tries=ticket.record.tries + 1, pictures=())
        while ticket.state is not State.RUNNING:
            self._go_on(ticket)
            begun = replace(begun, started=time.time())
            try:
                with self._writing:
                    if ticket.ending:
                        raise OverError
                    self.jobs.change(begun)
                ticket.become(begun)
            except UnkeptError as error:
                self._pause(ticket, error)

    def _run(self, ticket: Ticket) -> None:
        order, request = self._asked(ticket)
        if request:
            self._paint(ticket, request)
        else:
            self._enlarge(ticket, order)

    def _go_on(self, ticket: Ticket) -> None:
        """Raises OverError where the job has ended, or is to."""
        if ticket.cancelled or self._closed:
            self._give_up(ticket)
        if ticket.ending:
            raise OverError

    def _give_up(self, ticket: Ticket) -> None:
        """End it: in a folder, if nobody asked for that, it is done after the next start."""
        if self.folder and not ticket.wanted:
            self._end(ticket, State.POSTPONED, _postponed())
        else:
            self._end(ticket, State.CANCELLED, _cancelled())

    def _paint(self, ticket: Ticket, request: Request) -> None:
        order = ticket.record.order
        pipeline = self.models.pipeline(order.model, self.models.wished(order.wishes))
        job = request.resolve(pipeline.spec)
        self.limits.check(job)
        ticket.plan = pipeline.plan(job)
        freed = self.models.beside(pipeline)
        with closing(pipeline.run(job)) as events:
            advance: Callable[[], Event] = partial(next, events)
            interrupts = [KeyboardInterrupt()]  # a second would give up on what is painted
            while True:
                try:
                    event = advance()
                except KeyboardInterrupt:  # thrown below: all that is painted has been told
                    self._stopped(ticket)
                    return
                self._tell(ticket, replace(event, notices=(*freed(), *event.notices)))
                if event.result:
                    self._end(ticket, State.DONE, summary=summary_of(event.result))
                    return
                self._go_on(ticket)
                stops = ticket.wanted is State.STOPPED and interrupts
                advance = partial(events.throw, interrupts.pop()) if stops else partial(next, events)

    def _stopped(self, ticket: Ticket) -> None:
        """With the pictures that it has, or else with what there is of the first."""
        if not ticket.images and ticket.preview:
            notices = ("stopped before the first picture was painted: this is its newest preview",)
            self._tell(ticket, Event("decode", 1, 1, picture=ticket.preview, notices=notices))
        self._end(ticket, State.STOPPED)

    def _enlarge(self, ticket: Ticket, order: Order) -> None:
        upscaler = self.models.upscaler(order.model, self.models.wished(order.wishes))
        image, scale = order.options["image"], order.options.get("scale")
        picture = open_picture(image)
        height, width = upscaler.sizes(picture, scale)[-1]  # of what the last pass enlarges
        self.limits.check_counts(pixels=height * width * upscaler.scale**2)
        freed = self.models.beside(upscaler)
        enlarged = upscaler.enlarge(image, scale, partial(self._go_on, ticket))
        self._go_on(ticket)
        ticket.plan = enlarged.plan
        notices = (*freed(), *enlarged.notices)
        self._tell(ticket, Event("upscale", 1, 1, picture=enlarged.image, notices=notices))
        measured = asdict(enlarged.measured)
        self._end(ticket, State.DONE, summary={"stages": [{"upscale": measured}]})

    def bare(self, text: str) -> str:
        """The text with names in place of paths, if clients may give names alone."""
        return self.shelves.bare(text) if self.shelves else text

    def _tell(self, ticket: Ticket, event: Event) -> None:
        """Also what is painted is kept."""
        if event.picture and (parameters := event.picture.info.get(PARAMETERS)):
            event.picture.info[PARAMETERS] = self.bare(parameters)
        if event.picture and isinstance(self.jobs, Jobs):
            self._keep(ticket, event.picture, self.jobs.pictures)
        ticket.tell(event)

    def _keep(self, ticket: Ticket, picture: Image.Image, folder: Path) -> None:
        """As a file; where that cannot be done now, again and again, until the job is over."""
        file = folder / f"{ticket.id}-{len(ticket.record.pictures) + 1}.png"
        while not ticket.ending:
            try:
                save(picture, file)
                break
            except TightfitError as error:
                self._pause(ticket, error)
                self._go_on(ticket)
        if not ticket.add(file):  # it ended meanwhile
            file.unlink(missing_ok=True)

    def _end(
        self,
        ticket: Ticket,
        state: State,
        failure: BaseException | None = None,
        *,
        summary: Mapping[str, Any] | None = None,
    ) -> None:
        """Once: whoever comes later changes nothing. What is postponed waits in the folder, as if it had not
        been begun."""
        ended = self._ended(ticket, state, failure, summary)
        self._tell_end(ticket, ended, failure)

    def _ended(
        self,
        ticket: Ticket,
        state: State,
        failure: BaseException | None,
        summary: Mapping[str, Any] | None,
    ) -> Record | None:
        """What is told; None if it has ended before."""
        with self._writing:  # so that nothing is written after the folder is closed
            if not ticket.ends():
                return None
            record = ticket.record
            if isinstance(failure, TightfitError):
                failure.args = (said := self.bare(str(failure)),)
            else:
                said = first_line(failure) if failure else ""
            known = json.dumps({**(summary or record.summary), "notices": ticket.notices})
            ended = replace(
                record,
                state=state,
                ended=time.time(),
                error=said,
                summary=json.loads(self.bare(known)),
            )
            if state is State.POSTPONED:
                tries = record.tries - (record.state is State.RUNNING)
                self._write(replace(record, state=State.WAITING, started=None, tries=tries, pictures=()))
            else:
                self._write(ended)
        return ended

    @staticmethod
    def _tell_end(ticket: Ticket, ended: Record | None, failure: BaseException | None) -> None:
        """Without the lock, as listeners are called."""
        if ended:
            about = {"job": ticket.id, "state": ended.state.value, "error": ended.error}
            _log.info("job %s: %s %s", ticket.id, ended.state, ended.error, extra=about)
            ticket.become(ended, failure)

    def _write(self, record: Record) -> None:
        """What cannot be written now is known from memory, and written later."""
        self._unwritten[record.id] = replace(record, order=record.order.bare)
        self._write_again()

    def _write_again(self) -> None:
        try:
            with self._writing:
                for record in [*self._unwritten.values()]:
                    self.jobs.change(record)
                    del self._unwritten[record.id]
                    self.jobs.forget(self.limits.kept)
                self.problem = ""
        except Exception as error:  # whatever it is, the queue goes on
            _log.exception("a job cannot be recorded")
            self.problem = first_line(error)


class OverError(Exception):
    """The job that runs is over."""


def _cancelled() -> TightfitError:
    return TightfitError("the request was cancelled")


def _postponed() -> QueueFullError:
    return QueueFullError("the service is closed: the job is done after its next start")


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
