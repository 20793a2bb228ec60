"""A service whose jobs are painted by the machines of a cluster: one queue, one folder, one address. Knows no
Ray."""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, fields, replace
from io import BytesIO
from typing import Any

from PIL import Image

from ..errors import TightfitError, first_line
from ..events import Event
from ..jobs import Order, State
from ..machine.hardware import Hardware
from ..planner.wishes import Wishes
from ..request import Request, numbers_of
from ..service import TRIES, OverError, Service, Ticket
from .kinds import room_of
from .ledger import Item, Measures
from .painting import Encoded, Failed, News, Predicted, Stepped, Took, may_join
from .spread import Crew, Foreseen, Happened, Joined, Lost, Told
from .worker import About

_log = logging.getLogger("tightfit.service")


@dataclass(eq=False)
class _Task:
    """A job for one machine: an item for each of its pictures, those that are left, and what machines say
    that it takes there. joins: whether its pictures are one run. measures: of each picture. machines: that it
    was given to."""

    ticket: Ticket
    items: dict[int, Item]
    joins: bool
    left: list[int]
    known: dict[str, Predicted | str] = field(default_factory=dict)
    error: str = ""
    measures: list[Measures] = field(default_factory=list)
    machines: list[str] = field(default_factory=list)
    ends: ExitStack = field(default_factory=ExitStack)

    @property
    def group(self) -> int:
        return next(iter(self.items.values())).group

    def summary(self) -> dict[str, Any]:
        """What is kept of it besides its pictures, as JSON."""
        return {
            "machines": self.machines,
            "plan": [*dict.fromkeys(one.plan for one in self.measures)],
            "seconds": sum(one.seconds for one in self.measures),
            "peak_bytes": max((one.peak_bytes for one in self.measures), default=0),
        }


@dataclass(eq=False)
class _Hand:
    """A machine: what it is asked about, what it paints, and whether it was told to end that."""

    asked: _Task | None = None
    task: _Task | None = None
    is_stopping: bool = False

    @property
    def is_idle(self) -> bool:
        return not self.asked and not self.task


class Spreading(Service):
    """Each job goes to the soonest, by its own plan, of the machines that are idle and whom it fits; several
    run at a time. What a lost machine had in hand is painted by another. Pictures are enlarged here."""

    def __init__(self, crew: Crew, **given: Any) -> None:
        """`given` is as Service has it."""
        self._crew = crew
        self._hands: dict[str, _Hand] = {}
        self._tasks: dict[str, _Task] = {}  # by the ids of their jobs
        self._lost: list[Ticket] = []  # which run, and wait for another machine
        self._numbers, self._groups = itertools.count(1), itertools.count(1)
        self._enlarging: threading.Thread | None = None
        about = ("device", "folder", "shelves", "limits", "budget")  # each machine has its own budget
        self._wishes = {name: value for name, value in given.items() if name not in about}
        super().__init__(**given)

    def submit(self, model: str, asked: Request | Mapping[str, Any], **about: Any) -> Ticket:
        """As a service has it, but for a Request with adapters or conditions, whose files are here."""
        if isinstance(asked, Request) and (asked.adapters or asked.conditions):
            raise TightfitError(
                "adapters and pictures of a Request are of this machine, and others paint: submit options by "
                'their names, as {"prompt": "a cat", "lora": ["ink:0.8"], "image": picture}'
            )
        return super().submit(model, asked, **about)

    @property
    def at_work(self) -> list[Ticket]:
        painting = [hand.task.ticket for hand in [*self._hands.values()] if hand.task]
        every = {ticket.id: ticket for ticket in (*super().at_work, *painting, *self._lost)}
        running = [ticket for ticket in every.values() if not ticket.state.is_end]
        return sorted(running, key=lambda ticket: ticket.record.started or math.inf)

    @property
    def _is_enlarging(self) -> bool:
        return self._enlarging is not None and self._enlarging.is_alive()

    def _check_possible(self, order: Order, request: Request, wishes: Wishes) -> None:
        """Each machine says that for itself."""

    # ---------------------------------------------------------------------------------------- the worker

    def _work(self) -> None:
        try:
            while not self._closed:
                for happened in self._happened():
                    self._heed(happened)
                self._look_after()
                self._give_out()
        finally:
            for task in [*self._tasks.values()]:
                self._give_up(task.ticket)
                task.ends.close()
            if self._enlarging:
                self._enlarging.join()
            self._shut()

    def _happened(self) -> list[Happened]:
        try:
            return [*self._crew.wait()]
        except TightfitError as error:  # no machine is left: jobs wait until there is one
            if not self.problem:
                _log.warning("%s", error)
            self.problem = str(error)
            return []

    def _look_after(self) -> None:
        """Those that are to end, or have, and what else a queue is asked."""
        for name, hand in self._hands.items():
            if task := hand.task:
                if task.ticket.cancelled:
                    self._give_up(task.ticket)
                if (task.ticket.ending or task.ticket.wanted) and not hand.is_stopping:
                    hand.is_stopping = True
                    self._crew.stop(name)
        at_work = [hand.task for hand in self._hands.values()]
        for task in [task for task in self._tasks.values() if task not in at_work]:
            if task.ticket.cancelled:
                self._give_up(task.ticket)
            if task.ticket.ending or (task.ticket in self._lost and task.ticket.wanted):
                self._finish(task)
        if self._unloading and not self._is_enlarging:
            self._unloading = False
            self.models.free()
        if self._unwritten:
            self._write_again()

    # ---------------------------------------------------------------------------------------- what happens

    def _heed(self, happened: Happened) -> None:
        if isinstance(happened, Joined):
            self._hands[happened.node] = _Hand()
            self.problem = ""
        elif (hand := self._hands.get(happened.node)) is None:
            return
        elif isinstance(happened, Foreseen):
            if hand.asked and hand.asked.group == happened.group:
                hand.asked.known[happened.node] = happened.predicted
            hand.asked = None
        elif isinstance(happened, Told):
            self._hear(happened, hand)
        elif isinstance(happened, Lost):
            del self._hands[happened.node]
            for task in self._tasks.values():
                task.known.pop(happened.node, None)
            if hand.task:
                self._put_back(hand.task)

    def _hear(self, told: Told, hand: _Hand) -> None:
        task = hand.task
        if task:
            self._take_all(task, told.news)
        if told.is_over:
            hand.task, hand.is_stopping = None, False
            if task:
                self._finish(task)

    def _take_all(self, task: _Task, every: Sequence[News]) -> None:
        try:
            for news in every:
                self._take_in(task, news)
        except OverError:
            pass
        except Exception as error:  # of one job, which is no reason to end
            _log.exception("the job failed", extra={"job": task.ticket.id})
            self._end(task.ticket, State.FAILED, error)

    def _take_in(self, task: _Task, news: News) -> None:
        ticket = task.ticket
        if isinstance(news, Took):
            task.measures += [news.measures] * len(news.items)
        elif isinstance(news, Failed):
            task.error = task.error or news.error
        elif isinstance(news, Stepped | Encoded) and news.item.number in task.items:
            place = [*task.items].index(news.item.number)
            if isinstance(news, Stepped):
                self._tell(ticket, _placed(task, place, news.event))
            elif news.item.number in task.left:
                task.left.remove(news.item.number)
                picture = Image.open(BytesIO(news.content))
                picture.load()  # its text, too
                self._tell(ticket, Event("decode", 1, 1, image=place, picture=picture))

    def _finish(self, task: _Task) -> None:
        """Nothing comes of it any more."""
        ticket = task.ticket
        if ticket.ending:
            pass
        elif task.error and not ticket.wanted:
            self._end(ticket, State.FAILED, TightfitError(task.error))
        elif task.left and ticket.wanted is State.STOPPED:
            with suppress(OverError):
                self._stopped(ticket)
        elif task.left:
            self._end(ticket, State.FAILED, TightfitError("it was given up by the machine that painted it"))
        else:
            self._end(ticket, State.DONE, summary=task.summary())
        task.ends.close()
        self._tasks.pop(ticket.id, None)
        if ticket in self._lost:
            self._lost.remove(ticket)

    def _put_back(self, task: _Task) -> None:
        """Its machine was lost: another paints what is left, unless this has happened too often."""
        ticket = task.ticket
        if ticket.record.tries >= TRIES:
            said = f"the machine that painted it was lost, {ticket.record.tries} times: ask for less"
            self._end(ticket, State.FAILED, TightfitError(said))
        elif not task.left:
            self._finish(task)
        else:
            self._lost.append(ticket)

    # ---------------------------------------------------------------------------------------- who is next

    def _give_out(self) -> None:
        while True:
            idle = [name for name, hand in self._hands.items() if hand.is_idle]
            if (ticket := self._turn(idle)) is None:
                return
            if ticket.record.order.does == "upscale":
                self._enlarge_beside(ticket)
            elif task := self._task(ticket):
                self._offer(task, idle)

    def _turn(self, idle: list[str]) -> Ticket | None:
        """The job to see to: one that was lost, or whose turn it is, of those that an idle machine may take,
        or none of all."""
        with self._news:
            waiting = [*self._lost, *self._waiting]
            able = [ticket for ticket in waiting if not ticket.ending and self._may(ticket, idle)]
            lost = [ticket for ticket in able if ticket in self._lost]
            return lost[0] if lost else self._first(able) if able else None

    def _may(self, ticket: Ticket, idle: list[str]) -> bool:
        if ticket.record.order.does == "upscale":
            return not self._is_enlarging  # here, whoever else is busy
        if not idle:
            return False
        task = self._tasks.get(ticket.id)
        if task is None:
            return True
        if any(hand.asked is task for hand in self._hands.values()):
            return False
        is_refused = not self._crew.is_growing and all(
            isinstance(task.known.get(name), str) for name in self._hands
        )
        return is_refused or any(not isinstance(task.known.get(name), str) for name in idle)

    def _task(self, ticket: Ticket) -> _Task | None:
        """What machines are given of it; None where it has failed."""
        if ticket.id in self._tasks:
            return self._tasks[ticket.id]
        try:
            order, request = self._asked(ticket)
            assert request
            job = request.resolve(self.models.spec(order.model))
            self.limits.check(job)
        except Exception as error:  # of one job, which is no reason to end
            self._drop(ticket)
            self._end(ticket, State.FAILED, error)
            return None
        wishes, group = {**self._wishes, **order.wishes}, next(self._groups)
        asked = order.options or {field.name: getattr(request, field.name) for field in fields(Request)}
        previews = max(order.preview_every, request.preview_every)
        options = {**asked, "num_images": 1, "preview_every": previews}
        items = [
            Item(
                next(self._numbers), 0, group, order.model, wishes, {**options, **numbers_of(job, place)}, ""
            )
            for place in range(job.num_images)
        ]
        by_number = {item.number: item for item in items}
        task = self._tasks[ticket.id] = _Task(ticket, by_number, may_join(job), [*by_number])
        return task

    def _offer(self, task: _Task, idle: list[str]) -> None:
        """Ask those idle machines that were not asked yet; else give it to the soonest."""
        first = task.items[task.left[0]]
        for name in (unasked := [name for name in idle if name not in task.known]):
            self._hands[name].asked = task
            self._crew.predict(name, first, len(task.left))
        if unasked:
            return
        able = {name: known for name in idle if isinstance(known := task.known[name], Predicted)}
        if able:
            self._begin_at(min(able, key=lambda name: able[name].seconds), task)
            return
        reasons = "; ".join(dict.fromkeys(f"{known}" for known in task.known.values()))
        self._drop(task.ticket)
        task.error = f"it runs on no machine: {reasons}"
        self._finish(task)

    def _drop(self, ticket: Ticket) -> None:
        """It waits no more, if it has until now."""
        with self._news:
            self._waiting = [waiting for waiting in self._waiting if waiting is not ticket]

    def _begin_at(self, name: str, task: _Task) -> None:
        ticket, hand, known = task.ticket, self._hands[name], task.known[name]
        hand.task = task  # before it waits no more: see `active`
        task.machines.append(name)
        ticket.plan = known.plan if isinstance(known, Predicted) else None
        try:
            if ticket in self._lost:
                self._lost.remove(ticket)
                self._again(ticket)
            else:
                with self._news:
                    self._taken(ticket)
                self._begin(ticket)
                task.ends.enter_context(self._limited(ticket))
            self._crew.paint(name, [task.items[number] for number in task.left])
        except OverError:
            hand.task = None
            self._finish(task)
        except BaseException as error:
            hand.task, task.error = None, first_line(error)
            self._finish(task)

    def _again(self, ticket: Ticket) -> None:
        """It is begun once more, with the pictures that it has."""
        begun = replace(ticket.record, tries=ticket.record.tries + 1)
        self._write(begun)
        ticket.become(begun)

    def _enlarge_beside(self, ticket: Ticket) -> None:
        """Here, in a thread of its own, as others are heard meanwhile."""
        with self._news:
            if ticket not in self._waiting:  # it was cancelled meanwhile
                return
            self._running = ticket  # before it waits no more: see `active`
            self._taken(ticket)

        def enlarge() -> None:
            with self._told(ticket):
                self._begin(ticket)
                with self._limited(ticket):
                    self._run(ticket)

        self._enlarging = threading.Thread(target=enlarge, name="tightfit-upscale", daemon=True)
        self._enlarging.start()


def foremost(abouts: Sequence[About], seconds: Callable[[Hardware], float]) -> Hardware:
    """Of machines the one that paints soonest, by what is predicted of each; of those that are as fast, or
    where none paints, the roomiest card."""
    within = {
        (about.machine, about.budget_bytes): replace(about.hardware, free_bytes=about.budget_bytes)
        for about in abouts
    }
    machines = [*within.values()]
    if len(machines) == 1:
        return machines[0]
    return min(machines, key=lambda machine: (seconds(machine), room_of(machine)))


def _placed(task: _Task, place: int, event: Event) -> Event:
    """Of all pictures of the job: those that are no one run count by themselves."""
    count = len(task.items)
    if task.joins or event.stage != "denoise":
        return replace(event, image=place)
    return replace(event, image=place, step=place * event.steps + event.step, steps=count * event.steps)
