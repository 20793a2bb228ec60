"""One batch over several machines that differ. Work is taken, not dealt: whoever is idle takes what its own
plan says, so that a slow machine takes less; what a lost one had is taken by others. Knows no Ray."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from .ledger import ENDED, Item
from .painting import Encoded, Failed, News, Planner, Predicted, Stepped, Took
from .running import Keeping

RUN_SECONDS = 5.0  # of a run that is worth no division: to plan another number of pictures takes a second


@dataclass(frozen=True)
class Joined:
    """A machine can be given work."""

    node: str
    machine: str


@dataclass(frozen=True)
class Foreseen:
    """What pictures of a group take there, or why they do not run."""

    node: str
    group: int
    predicted: Predicted | str


@dataclass(frozen=True)
class Told:
    """What has become of pictures that are painted there."""

    node: str
    news: Sequence[News]
    is_over: bool


@dataclass(frozen=True)
class Lost:
    """Nothing comes from there any more."""

    node: str
    error: str


Happened = Joined | Foreseen | Told | Lost


class Crew(Planner, Protocol):
    """Machines that come and go, by their names. Each does one thing at a time. note: called with what a
    person should know."""

    note: Callable[[str], object]

    @property
    def is_growing(self) -> bool:
        """Whether a machine is about to join."""
        ...

    def wait(self) -> Sequence[Happened]:
        """What happens next, or nothing after a second. Raises TightfitError where no machine is left."""
        ...

    def predict(self, node: str, item: Item, count: int) -> None:
        """Have it foretold there what so many like it take."""
        ...

    def paint(self, node: str, items: Sequence[Item]) -> None:
        """Have those painted there, all of one group."""
        ...

    def stop(self, node: str) -> None:
        """End its run after the pictures that are painted."""
        ...


@dataclass
class Share:
    """What a machine has painted of a batch."""

    machine: str
    painted: int = 0
    seconds: float = 0.0
    lost: int = 0
    """How often it was lost."""


@dataclass
class _Hand:
    """A machine at work: of what it has in hand, what is left; what it knows of groups; which is its last;
    and when its run began, and is likely to end."""

    items: dict[int, Item] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)
    known: dict[int, Predicted | str] = field(default_factory=dict)
    group: int | None = None
    is_busy: bool = False
    since: float = 0.0
    until: float = 0.0

    def pace(self, group: int) -> float:
        """Pictures a second, 0 where that is not known."""
        known = self.known.get(group)
        return 1 / max(known.seconds, 1e-9) if isinstance(known, Predicted) else 0.0


@dataclass
class Spread(Keeping):
    """One run of a batch, by a crew."""

    crew: Crew = field(kw_only=True)
    clock: Callable[[], float] = time.monotonic
    shares: dict[str, Share] = field(default_factory=dict, init=False)
    _hands: dict[str, _Hand] = field(default_factory=dict, init=False)
    _waiting: dict[int, int] = field(default_factory=dict, init=False)  # groups in order
    _firsts: dict[int, Item] = field(default_factory=dict, init=False)
    _again: deque[Item] = field(default_factory=deque, init=False)  # alone, as one may have ended its process
    _ended: Counter[int] = field(default_factory=Counter, init=False)

    def run(self) -> None:
        """Paint all that waits. Raises what `Batch.run` raises, and TightfitError where no machine is
        left."""
        self._waiting = dict(self.ledger.groups())
        is_stopping = False
        try:
            with _deferred() as interrupted:
                while self._goes_on(is_stopping):
                    for happened in self.crew.wait():
                        self._heed(happened)
                    if interrupted and not is_stopping:
                        is_stopping = True
                        for name, hand in self._hands.items():
                            if hand.left:
                                self.crew.stop(name)
                    elif not is_stopping:
                        self._give_out()
        finally:
            in_hand = [hand.items[number] for hand in self._hands.values() for number in hand.left]
            self.ledger.give_back([*in_hand, *self._again])
        if is_stopping:
            raise KeyboardInterrupt
        self._twins()

    def _goes_on(self, is_stopping: bool) -> bool:
        if any(hand.left for hand in self._hands.values()):
            return True
        if not is_stopping and not any(self._waiting.values()) and not self._again:
            self._waiting = dict(self.ledger.groups())  # what failed, and is tried again
        return not is_stopping and (any(self._waiting.values()) or bool(self._again))

    # ------------------------------------------------------------------------------------ what happens

    def _heed(self, happened: Happened) -> None:
        if isinstance(happened, Joined):
            self._hands[happened.node] = _Hand()
            self.shares.setdefault(happened.node, Share(happened.machine))
        elif (hand := self._hands.get(happened.node)) is None:
            return
        elif isinstance(happened, Foreseen):
            hand.is_busy = False
            hand.known[happened.group] = happened.predicted
        elif isinstance(happened, Told):
            self._hear(happened, hand)
        else:
            self.shares[happened.node].lost += 1
            self._over(happened.node, hand)
            del self._hands[happened.node]
            self._lost([hand.items[number] for number in hand.left])

    def _hear(self, told: Told, hand: _Hand) -> None:
        share = self.shares[told.node]
        for news in told.news:
            if (known := _known(news, hand.items)) is None:
                continue
            if isinstance(known, Encoded | Failed):
                if known.item.number not in hand.left:
                    continue
                before = self.painted
                self._keep(known)
                hand.left.discard(known.item.number)
                share.painted += self.painted - before
            else:
                self._keep(known)
        if told.is_over:
            self._over(told.node, hand)
            self.ledger.give_back([hand.items[number] for number in hand.left])
            for number in hand.left:
                self._put_back(hand.items[number])
            hand.items, hand.left = {}, set()

    def _over(self, node: str, hand: _Hand) -> None:
        if hand.items:
            self.shares[node].seconds += self.clock() - hand.since
        hand.is_busy = False

    def _put_back(self, item: Item) -> None:
        self._waiting[item.group] = self._waiting.get(item.group, 0) + 1

    def _lost(self, items: Sequence[Item]) -> None:
        """They are taken again, each alone; what has been lost too often may be why, and has failed."""
        for item in items:
            self._ended[item.number] += 1
            if (times := self._ended[item.number]) >= ENDED + self.retries:
                said = f"the process that painted it ended, {times} times"
                self._ended[item.number] = 0
                self._keep(Failed(item, said), for_good=True)
            else:
                self._again.append(item)
                self.begun_again += 1

    # ------------------------------------------------------------------------------------ who takes what

    def _give_out(self) -> None:
        for name, hand in self._hands.items():
            if not hand.is_busy:
                self._offer(name, hand)
        if not self.crew.is_growing:
            self._refuse()

    def _offer(self, name: str, hand: _Hand) -> None:
        """Give an idle machine what it can do best; first it is asked what that would take."""
        again = next((item for item in self._again if self._may(hand, item.group)), None)
        for group in [again.group] if again else self._choose(hand):
            if hand.known.get(group) is None or again or self._is_in_time(hand, group):
                break
        else:
            return
        known = hand.known.get(group)
        if known is None:
            hand.is_busy = True
            self.crew.predict(name, again or self._first(group), max(1, self._waiting.get(group, 1)))
        elif again:
            self._again.remove(again)
            self._begin(name, hand, [again])
        elif isinstance(known, Predicted):
            items = self.ledger.take(group, self._count(hand, group, known))
            self._waiting[group] = max(0, self._waiting[group] - len(items)) if items else 0
            self._begin(name, hand, items)

    def _begin(self, name: str, hand: _Hand, items: Sequence[Item]) -> None:
        if not items:
            return
        hand.items = {item.number: item for item in items}
        hand.left, hand.group, hand.is_busy = {*hand.items}, items[0].group, True
        hand.since = self.clock()
        hand.until = hand.since + len(items) / hand.pace(items[0].group)
        self.crew.paint(name, items)

    def _may(self, hand: _Hand, group: int) -> bool:
        return not isinstance(hand.known.get(group), str)

    def _first(self, group: int) -> Item:
        if group not in self._firsts:
            self._firsts[group] = self.ledger.peek(group)
        return self._firsts[group]

    def _choose(self, hand: _Hand) -> list[int]:
        """Groups, the best first: that it is at; then those that fewest others are at, and that are next to
        it in the order in which models change least; to begin with, the largest."""
        at = Counter(other.group for other in self._hands.values() if other is not hand and other.left)
        groups = [*self._waiting]
        place = groups.index(hand.group) if hand.group in self._waiting else None
        able = [
            (group != hand.group, at[group], -self._waiting[group] if place is None else abs(number - place))
            for number, group in enumerate(groups)
        ]
        fit = [
            (*rank, number)
            for number, rank in enumerate(able)
            if self._waiting[groups[number]] and self._may(hand, groups[number])
        ]
        return [groups[rank[-1]] for rank in sorted(fit)]

    def _count(self, hand: _Hand, group: int, known: Predicted) -> int:
        """As many as its plan takes at once, and towards the end no more than its share, by its pace, of all
        that waits, so that all end together."""
        paces = sum(other.pace(group) for other in self._hands.values())
        share = math.ceil(sum(self._waiting.values()) * hand.pace(group) / paces)
        return max(1, min(known.together, max(share, int(RUN_SECONDS * hand.pace(group)))))

    def _is_in_time(self, hand: _Hand, group: int) -> bool:
        """Whether it makes a picture before the others would have made all that waits."""
        others = [other for other in self._hands.values() if other is not hand and other.pace(group)]
        if not others:
            return True
        now, waiting = self.clock(), sum(self._waiting.values())
        pairs = [(one.pace(group), max(0.0, one.until - now) if one.left else 0.0) for one in others]
        pictures = waiting + sum(pace * busy for pace, busy in pairs)
        end = max(
            pictures / sum(pace for pace, _ in pairs),
            min(busy + 1 / pace for pace, busy in pairs),
        )
        return 1 / hand.pace(group) <= end * (1 + 1e-9)  # as `fleet.taken` has it

    def _refuse(self) -> None:
        """What every machine has refused has failed."""
        hands = [*self._hands.values()]
        if not hands:
            return
        for item in [item for item in self._again if not any(self._may(hand, item.group) for hand in hands)]:
            self._again.remove(item)
            self._keep(Failed(item, f"{hands[0].known[item.group]}"), for_good=True)
        for group, count in self._waiting.items():
            if count and not any(self._may(hand, group) for hand in hands):
                for item in self.ledger.take(group, count):
                    self._keep(Failed(item, f"{hands[0].known[group]}"), for_good=True)
                self._waiting[group] = 0


def _known(news: News, items: dict[int, Item]) -> News | None:
    """The same, of our own items; None for what is of others."""
    if isinstance(news, Took):
        own = tuple(items[item.number] for item in news.items if item.number in items)
        return replace(news, items=own) if own else None
    if isinstance(news, Stepped | Encoded | Failed) and (item := items.get(news.item.number)):
        return replace(news, item=item)
    return None


@contextmanager
def _deferred() -> Iterator[list[bool]]:
    """The first Ctrl-C only comes into the list, so that what is being written is; the second raises
    KeyboardInterrupt. As before where that is not ours to say."""
    interrupted: list[bool] = []

    def heard(number: int, _: object) -> None:
        if interrupted:
            signal.default_int_handler(number, None)
        interrupted.append(True)

    before = signal.getsignal(signal.SIGINT)
    is_ours = threading.current_thread() is threading.main_thread() and before is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, heard)
    try:
        yield interrupted
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, before)
