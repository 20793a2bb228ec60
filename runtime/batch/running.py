"""A batch from its ledger to its pictures: what is next, who paints it, where it goes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from ..errors import TightfitError
from .ledger import Item, Ledger
from .painting import Encoded, Failed, Made, News, Painter, Planner, Predicted, Took
from .table import RowError

MOST_CHECKED = 1000
"""Kinds of requests that are planned before any work; others are when they are painted."""


class FailedError(TightfitError):
    """A picture failed, and the batch was to end at that."""


@dataclass(frozen=True)
class Group:
    """Pictures of one kind that wait: how many, the first of them, and what each is predicted to take."""

    id: int
    count: int
    first: Item
    predicted: Predicted

    @property
    def seconds(self) -> float:
        return self.count * self.predicted.seconds


def planned(ledger: Ledger, planner: Planner) -> tuple[list[Group], int, list[RowError]]:
    """The first MOST_CHECKED kinds of pictures that wait, how many pictures there are of others, and what is
    wrong with those that do not run."""
    groups, errors = [], []
    waiting = ledger.groups()
    for id_, count in waiting[:MOST_CHECKED]:
        item = ledger.peek(id_)
        try:
            groups.append(Group(id_, count, item, planner.predicted(item, count)))
        except TightfitError as error:
            errors.append(wrong(item, count, error))
    return groups, sum(count for _, count in waiting[MOST_CHECKED:]), errors


def wrong(item: Item, count: int, error: TightfitError) -> RowError:
    """What is wrong with so many pictures, the first of which is `item`."""
    alike = f" (as do {count - 1} alike)" if count > 1 else ""
    return RowError(item.row, f"{error}{alike}")


class Places(Protocol):
    """Where the file of a picture goes, in the ledger's folder, and what it holds."""

    def encoded(self, made: Made) -> Encoded: ...

    def __call__(self, encoded: Encoded) -> Path: ...

    def copied(self, item: Item, file: Path) -> Path:
        """Of a picture that is the same as that of another item, in `file`."""
        ...


@dataclass
class Keeping:
    """What a run of a batch keeps of its news.

    place: where pictures go. tell: called with all that happens. retries: how often one that failed is tried
    again. fail_fast: end at the first that failed. copy: called with the file of each picture.
    """

    ledger: Ledger
    place: Places
    tell: Callable[[News], object] = lambda _: None
    retries: int = 0
    fail_fast: bool = False
    copy: Callable[[Path], object] = lambda _: None
    painted: int = field(default=0, init=False)
    begun_again: int = field(default=0, init=False)
    """Pictures whose process has ended while they were painted, in this run or before."""

    def _keep(self, news: News, for_good: bool = False) -> None:
        """`for_good`: what failed is not tried again, whatever its retries."""
        if isinstance(news, Made):
            news = self.place.encoded(news)
        if isinstance(news, Encoded) and (
            error := self._unwritten(news.item, self.place(news), news.content)
        ):
            news = Failed(news.item, error)
        if isinstance(news, Took):
            self.ledger.measured(news.items, news.measures)
        elif isinstance(news, Failed):
            again = self.ledger.failed(news.item, news.error, -1 if for_good else self.retries)
            if self.fail_fast and not again:
                self.tell(news)
                raise FailedError(f"row {news.item.row}: {news.error}")
        self.tell(news)

    def _unwritten(self, item: Item, file: Path, content: bytes) -> str | None:
        """Write a picture, or say why it alone cannot be."""
        try:
            self.ledger.write(item, file, content)
        except NotADirectoryError as error:
            return f"{error}: name it otherwise"
        self.painted += 1
        self.copy(file)
        return None

    def _twins(self) -> None:
        """Pictures that are the same as others are copied."""
        for item, file in [*self.ledger.twins()]:
            error = "it is the same as one that failed"
            if file is not None:
                error = self._unwritten(item, self.place.copied(item, file), file.read_bytes())
            if error:
                self.ledger.failed(item, error, retries=-1)


@dataclass
class Batch(Keeping):
    """One run of a batch, by one painter."""

    painter: Painter = field(kw_only=True)

    def run(self) -> None:
        """Paint all that waits. Raises UnkeptError where nothing can be written, FailedError to fail fast,
        and KeyboardInterrupt after the pictures that are painted."""
        for id_, count in self.ledger.groups():
            together = self._together(self.ledger.peek(id_), count)
            while items := self.ledger.take(id_, together):
                self._paint(items)
        self._twins()

    def _together(self, item: Item, count: int) -> int:
        try:
            return self.painter.predicted(item, count).together
        except TightfitError:  # which is said of the picture
            return 1

    def _paint(self, items: Sequence[Item]) -> None:
        news = self.painter.paint(items)
        advance: Callable[[], News] = partial(next, news)  # pyright: ignore[reportAssignmentType]
        unkept: News | None = None
        is_interrupted = False
        try:
            while True:
                try:
                    unkept = advance()
                    unkept = self._keep(unkept)
                    advance = partial(next, news)  # pyright: ignore[reportAssignmentType]
                except StopIteration:
                    return
                except KeyboardInterrupt as interrupt:
                    if is_interrupted or not isinstance(news, Generator):
                        raise
                    is_interrupted, advance = True, partial(news.throw, interrupt)
                    unkept = unkept and self._keep(unkept)
        finally:
            if isinstance(news, Generator):
                news.close()
            self.ledger.give_back(items)
