"""A job as whoever asked for it sees it, from the queue to its end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from PIL import Image

from .errors import TightfitError
from .events import Event, Result
from .jobs import Record, State
from .planner.plan import Plan
from .request import Request

_log = logging.getLogger("tightfit.service")


class Ticket:
    """A job that waits, runs, or has ended. Made by `Service.submit`. Safe to use from threads."""

    def __init__(
        self,
        record: Record,
        request: Request | None = None,
        asked: Callable[[Ticket], object] = lambda _: None,
    ) -> None:
        """`asked` is called when somebody wants it to end."""
        self.record, self.request = record, request
        self.preview: Image.Image | None = None
        """The latest: of the latents, or of a picture that is painted."""
        self.plan: Plan | None = None
        self.wanted: State | None = None  # STOPPED or CANCELLED, once somebody asks for it
        self._asked = asked
        self._events: list[Event] = []
        self._failure: BaseException | None = None
        self._result: Result | None = None
        self._ending = False
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
        return [event.picture for event in self.seen(0) if event.picture]

    @property
    def notices(self) -> list[str]:
        """What its events have told so far, each once."""
        return [*dict.fromkeys(notice for event in self.seen(0) for notice in event.notices)]

    @property
    def last(self) -> Event | None:
        """The newest event."""
        with self._news:
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
        if self.state.is_end:
            return 1.0
        event = next((event for event in reversed(self.seen(0)) if event.stage == "denoise"), None)
        return event.step / event.steps if event else 0.0

    def listen(self, listener: Callable[[], object]) -> Callable[[], None]:
        """Call `listener`, in another thread, whenever something has changed. Returns what ends that, as does
        an exception of its own."""
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
        """Wait for the end. Raises as `events` does, and a TightfitError for a job that was stopped, or
        enlarged a picture: these have `images` alone."""
        self.wait()
        if self._failure:
            raise self._failure
        if not self._result:
            raise TightfitError("the job has pictures and no result: read images")
        return self._result

    def cancel(self) -> None:
        """Do not begin it; if it runs, stop after the step it is at."""
        self.wanted = State.CANCELLED
        self._asked(self)

    def stop(self) -> None:
        """As `cancel`, but keep the pictures that are painted; before the first is, the newest preview."""
        self.wanted = self.wanted or State.STOPPED
        self._asked(self)

    # What the service tells.

    def tell(self, event: Event) -> None:
        """Nothing is told after the end."""
        with self._news:
            if self.state.is_end:
                return
            self.preview = event.picture or event.preview or self.preview
            self._result = event.result or self._result
            if self._events:
                self._events[-1] = replace(self._events[-1], preview=None)
            self._events.append(event)
        self._changed()

    def add(self, picture: Path) -> bool:
        """It was written as this file. Not after the end, whose record has no more pictures."""
        with self._news:
            if not self._ending:
                self.record = replace(self.record, pictures=(*self.record.pictures, picture))
            return not self._ending

    def ends(self) -> bool:
        """Whether it may be ended now: once, by whoever asks first."""
        with self._news:
            is_first, self._ending = not self._ending, True
        return is_first

    @property
    def ending(self) -> bool:
        """Whether it has ended, or is about to."""
        return self._ending

    def become(self, record: Record, failure: BaseException | None = None) -> None:
        """Nothing changes after the end."""
        with self._news:
            if self.state.is_end:
                return
            self.record = record
            self._failure = failure and failure.with_traceback(None)  # whose frames hold pictures and tensors
        self._changed()

    def _changed(self) -> None:
        with self._news:
            self._news.notify_all()
        for listener in [*self._listeners]:
            try:
                listener()
            except Exception:  # such as a client's loop that is closed: no reason to end the job
                _log.exception("a listener failed", extra={"job": self.id})
                with suppress(ValueError):
                    self._listeners.remove(listener)
