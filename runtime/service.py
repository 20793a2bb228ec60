"""One queue before all models of a machine: what long-lived doors stand on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from .errors import TightfitError
from .events import Event, Result
from .machine.hardware import Hardware
from .models.hub import inspect
from .pipeline import MANY, Pipeline
from .planner.wishes import Wishes
from .request import Request


class Ticket:
    """A request that waits, runs, or has ended. Made by `Service.submit`."""

    def __init__(self, model: str, request: Request) -> None:
        self.model, self.request = model, request
        self.cancelled = False
        self._news: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self._last: Event | BaseException | None = None

    def events(self) -> Iterator[Event]:
        """Events as they happen, each once; the last has the result, and comes again to whoever asks later.
        Raises what the run raised, and a TightfitError if it was cancelled."""
        while True:
            news = self._last or self._news.get()
            if isinstance(news, BaseException) or news.result:
                self._last = news
                self._news.put(news)  # for others that wait
            if isinstance(news, BaseException):
                raise news
            yield news
            if news.result:
                return

    def result(self) -> Result:
        """Wait for the end. Raises as `events` does."""
        *_, last = self.events()
        assert last.result
        return last.result

    def cancel(self) -> None:
        """Do not begin it; if it runs, stop after the step it is at."""
        self.cancelled = True

    def tell(self, news: Event | BaseException) -> None:
        self._news.put(news)


class Service:
    """Runs requests for any model one after another, in the order they came, in a thread of its own.

    Models stay open; on a device that has no room for the next, what the longest idle one has loaded is
    freed. `wishes` are the fields of Wishes, of all models. Use as a context manager, or `close` it.
    """

    def __init__(self, *, device: str = "auto", most_waiting: int = 100, **wishes: Any) -> None:
        """Raises TightfitError for a device or wishes that there are not. No model is opened yet."""
        self._hardware = Hardware.detect(device)
        self._wishes = Wishes(**{"requests": MANY, **wishes})
        self._waiting: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._most_waiting = most_waiting
        self._pipelines: dict[str, Pipeline] = {}
        self._closed = False
        self._lock = threading.Lock()
        self._worker = threading.Thread(target=self._work, name="tightfit-service", daemon=True)
        self._worker.start()

    def submit(self, model: str, request: Request) -> Ticket:
        """Queue `request`. Raises TightfitError for one that no model could do, and if the queue is full or
        the service closed."""
        ticket = Ticket(model, request.checked())
        with self._lock:
            if self._closed:
                raise TightfitError("the service is closed: no more requests are taken")
            if self._waiting.qsize() >= self._most_waiting:
                raise TightfitError(f"{self._most_waiting} requests wait already: try again later")
            self._waiting.put(ticket)
        return ticket

    def close(self) -> None:
        """Take no more requests, cancel those that wait or run, and free everything."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._waiting.put(None)
        self._worker.join()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        try:
            while ticket := self._waiting.get():
                try:
                    self._run(ticket)
                except BaseException as error:  # whoever submitted it is told; the next is not theirs
                    ticket.tell(error)
        finally:
            for pipeline in self._pipelines.values():
                pipeline.close()

    def _run(self, ticket: Ticket) -> None:
        ticket.cancelled |= self._closed
        if not ticket.cancelled and ticket.model not in self._pipelines:
            self._pipelines[ticket.model] = Pipeline(inspect(ticket.model), self._hardware, self._wishes)
        if not ticket.cancelled:
            with closing(self._pipelines[ticket.model].run(ticket.request)) as events:
                for event in events:
                    ticket.tell(event)
                    if event.result:
                        return
                    if ticket.cancelled or self._closed:
                        break
        raise TightfitError("the request was cancelled")
