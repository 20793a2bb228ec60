"""One machine of several: is told pictures to paint as plain data, and asked what became of them. What it is
called by, Ray or a test, is not its affair."""

from __future__ import annotations

import os
import platform
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ... import __version__
from ..asking import Shelves
from ..errors import TightfitError, first_line
from ..machine.hardware import Hardware
from ..open_models import OpenModels
from ..pipeline import MANY
from ..planner.choose import budget_of
from ..planner.wishes import Wishes
from ..texts import TEXTS
from .ledger import Item
from .painting import Encoding, Failed, Here, Made, News, Predicted, Stepped
from .staging import Stage

_GATHER_SECONDS = 0.5  # steps are told so often, at most: each message takes the driver about 1 ms


@dataclass(frozen=True)
class Setup:
    """What every machine is told before it paints. folder: where the command was given, from where paths
    count. budget: of each machine, at most; its own may be less. staged: digests of models that are sent, by
    the names that rows have for them. named: where rows are a stranger's, the models by their paths that may
    be named besides those of models_dirs. keeps_texts: what text encoders answer; None is as the machine's
    environment says."""

    encoding: Encoding
    folder: str
    models_dirs: tuple[str, ...] = ()
    device: str = "auto"
    budget: str | None = None
    images_per_call: int = 1
    staged: tuple[tuple[str, str], ...] = ()
    named: tuple[tuple[str, str], ...] | None = None
    keeps_texts: bool | None = None


@dataclass(frozen=True)
class About:
    """What a machine is. missing: digests of models that it has not been sent yet."""

    versions: tuple[str, str]
    machine: str
    budget_bytes: int
    missing: tuple[str, ...]
    hardware: Hardware


def versions() -> tuple[str, str]:
    """Of tightfit and of Python."""
    return __version__, platform.python_version()


class Worker:
    """Paints, and is asked for news until its run is over. `budget` is this machine's own, "" for none."""

    def __init__(self, setup: Setup, budget: str = "") -> None:
        self._setup, self._budget = setup, budget
        self._stage = Stage()
        self._here: Here | None = None
        self._news: queue.SimpleQueue[News | None] = queue.SimpleQueue()  # None ends a run
        self._stopping = threading.Event()

    def about(self, *_: object) -> About:
        """Raises TightfitError for a device or a budget that there is not."""
        setup = self._setup
        with suppress(OSError):  # then paths without a root are not found here, which is said of each
            os.chdir(setup.folder)
        if setup.keeps_texts is not None:
            TEXTS.keep(setup.keeps_texts)
        machine = Hardware.detect(setup.device)
        wishes = Wishes(budget=self._least_budget(), requests=MANY, images_per_call=setup.images_per_call)
        shelves = None if setup.named is None else Shelves(setup.models_dirs, dict(setup.named))
        self._here = Here(OpenModels(machine, shelves, wishes), [Path(place) for place in setup.models_dirs])
        missing = tuple(digest for _, digest in setup.staged if not self._stage.place(digest))
        return About(versions(), machine.name, budget_of(machine, wishes), missing, machine)

    def _least_budget(self) -> int | None:
        given = [Wishes(budget=text).budget for text in (self._setup.budget, self._budget or None)]
        return min((budget for budget in given if budget is not None), default=None)

    def add(self, digest: str, name: str, content: bytes) -> None:
        """The next part of a file of a model. Raises TightfitError."""
        self._stage.add(digest, name, content)

    def finish(self, digest: str, *_: object) -> None:
        """The model is whole: all its parts were added."""
        self._stage.finish(digest)

    def predicted(self, item: Item, count: int) -> Predicted | str:
        """What pictures like it take here, or why it does not run."""
        try:
            return self.here.predicted(self._local(item), count)
        except Exception as error:  # one row is no reason to lose the machine
            return str(error) if isinstance(error, TightfitError) else first_line(error)

    @property
    def here(self) -> Here:
        if self._here is None:
            self.about()
        assert self._here
        return self._here

    def _local(self, item: Item) -> Item:
        """With the place here of a model that was sent."""
        digest = dict(self._setup.staged).get(item.model)
        place = self._stage.place(digest) if digest else None
        return replace(item, model=str(place)) if place else item

    def paint(self, items: Sequence[Item]) -> None:
        """Begin with those, all of one group."""
        self._stopping.clear()
        threading.Thread(target=self._paint, args=(items,), daemon=True).start()

    def stop(self) -> None:
        """End the run after the pictures that are painted."""
        self._stopping.set()

    def news(self) -> tuple[list[News], bool]:
        """What has happened since, after a while at most, and whether the run is over. Of steps the newest is
        told, and those with notices."""
        told, end = list[News](), time.monotonic() + _GATHER_SECONDS
        is_over = False
        while not is_over and (left := end - time.monotonic()) > 0:
            with suppress(queue.Empty):
                news = self._news.get(timeout=left)
                is_over = news is None
                if news is not None:
                    told.append(news)
                if not isinstance(news, Stepped):
                    break
        steps = [one for one in told if isinstance(one, Stepped)]
        return [
            one for one in told if not isinstance(one, Stepped) or one is steps[-1] or one.event.notices
        ], is_over

    def _paint(self, items: Sequence[Item]) -> None:
        try:
            for news in self._run(items):
                self._news.put(self._encoded(news))
        except BaseException as error:  # of which nothing else would hear
            for item in items if not isinstance(error, KeyboardInterrupt) else ():
                self._news.put(Failed(item, first_line(error)))
        finally:
            self._news.put(None)

    def _run(self, items: Sequence[Item]) -> Iterator[News]:
        news = self.here.paint([self._local(item) for item in items])
        for one in news:
            yield one
            if self._stopping.is_set():
                with suppress(StopIteration):
                    yield news.throw(KeyboardInterrupt())
                yield from news
                return

    def _encoded(self, news: News) -> News:
        if not isinstance(news, Made):
            return news
        try:
            return self._setup.encoding.encoded(news)
        except Exception as error:  # such as a side too long for its format
            return Failed(news.item, first_line(error))
