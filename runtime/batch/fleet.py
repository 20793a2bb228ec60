"""A batch on cards that are not here: which of them paints what, how long that takes, and what holds it up.

Work is taken, not dealt: a node that is free takes pictures of the first kind that fits it, unless the others
would have made all of them before its next is there. Kinds come in the order of the batch's groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

TEN_GIGABIT = 1.25e9  # bytes/s of 10 Gbit Ethernet: what shared storage, or one node, gives at most
_PIXEL_BYTES = 1.8  # of a PNG
_PRECISE = 1e-12  # of a moment


@dataclass(frozen=True)
class Card:
    """Nodes with one card each of profiles/. price: dollars an hour of each, or None."""

    name: str
    count: int
    price: float | None = None


@dataclass(frozen=True)
class Way:
    """How a card paints pictures of one kind: seconds of a picture, how many a node takes at once, the peak
    with the context, and the plan in a phrase."""

    seconds: float
    together: int
    peak_bytes: int
    plan: str


@dataclass(frozen=True)
class Kind:
    """Pictures of one plan. rows: those that ask for them, or the first. model_bytes: weights that a node
    reads before its first. pixels: of one picture. ways: by the name of a card. refusals: why it does not fit
    others, the roomiest card first, processors last."""

    rows: tuple[int, ...]
    pictures: int
    model: str
    model_bytes: int
    pixels: int
    ways: Mapping[str, Way]
    refusals: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """What all nodes share. storage_rate: bytes/s that shared storage gives to all of them together.
    network_rate: bytes/s of one node. staged: models come from the driver, not from the storage.

    The driver takes one PNG after another: over its network, then `take_seconds` and `pixel_seconds` of each
    pixel for its hash, its file and its line in the ledger. Nodes encode PNGs. Measured on two cores: 0.25 ms
    at 64x64 (7.5 kB), 0.8 at 512x512 (463 kB of blurred noise), 2.2 at 1024x1024. What carries the messages
    comes on top."""

    storage_rate: float = TEN_GIGABIT
    network_rate: float = TEN_GIGABIT
    staged: bool = False
    take_seconds: float = 2.5e-4
    pixel_seconds: float = 2e-9

    @property
    def source_rate(self) -> float:
        """Bytes/s of the one place that all read models from."""
        return self.network_rate if self.staged else self.storage_rate

    def driver_seconds(self, kind: Kind) -> float:
        """The driver's, of each picture."""
        return self.take_seconds + (self.pixel_seconds + _PIXEL_BYTES / self.network_rate) * kind.pixels

    def reading_seconds(self, model_bytes: int, nodes: int) -> float:
        """Until so many nodes that begin together have read a model."""
        return model_bytes / min(self.network_rate, self.source_rate / max(1, nodes))


@dataclass(frozen=True)
class Share:
    """What the nodes of one card paint: pictures of each kind, and the seconds of all of its nodes that are
    spent on painting, and on reading models."""

    card: Card
    pictures: tuple[int, ...]
    painting_seconds: float
    reading_seconds: float


@dataclass(frozen=True)
class Schedule:
    """A whole batch. seconds: until the driver has written the last picture. painted_seconds: until that is
    painted. reading_seconds: the longest that a node reads models. driver_seconds: the driver's work."""

    site: Site
    kinds: tuple[Kind, ...]
    shares: tuple[Share, ...]
    seconds: float
    painted_seconds: float
    reading_seconds: float
    driver_seconds: float

    @property
    def pictures(self) -> int:
        return sum(sum(share.pictures) for share in self.shares)

    @property
    def nodes(self) -> int:
        return sum(share.card.count for share in self.shares)

    @property
    def cost(self) -> float | None:
        """Dollars until the end for all nodes of cards that paint; None where a price is not known."""
        cards = [share.card for share in self.shares if sum(share.pictures)]
        hourly = sum(card.count * card.price for card in cards if card.price)
        return None if any(card.price is None for card in cards) else hourly * self.seconds / 3600

    @property
    def card_seconds(self) -> float:
        """Of painting, on all nodes together."""
        return sum(share.painting_seconds for share in self.shares)

    @property
    def model_bytes(self) -> int:
        """Of all models, each once."""
        models: dict[str, int] = {}
        for kind in self.kinds:
            models[kind.model] = max(kind.model_bytes, models.get(kind.model, 0))
        return sum(models.values())

    @property
    def parts(self) -> dict[str, float]:
        """The seconds by what they go to: all nodes painting all the time, the longest reading of models,
        what the driver takes beyond these, and waiting for the last pictures."""
        painting = self.card_seconds / self.nodes
        return {
            "painting": painting,
            "reading models": self.reading_seconds,
            "the driver": self.seconds - self.painted_seconds,
            "the last pictures": max(0.0, self.painted_seconds - painting - self.reading_seconds),
        }

    @property
    def bound(self) -> str:
        """What takes most of the seconds."""
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def per_hour(self) -> float:
        """Pictures."""
        return 3600 * self.pictures / self.seconds if self.seconds else 0.0

    @property
    def driver_nodes(self) -> float:
        """So many nodes such as these give the driver all that it can write."""
        if not self.card_seconds or not self.driver_seconds:
            return math.inf
        return self.card_seconds / self.driver_seconds

    def best_nodes(self, rate: float) -> float:
        """So many nodes such as these end soonest, where each reads the models from one place that gives
        `rate` bytes/s to all: n * bytes / rate + card_seconds / n is least there. As long as each has its
        own network's rate, more are no slower."""
        if not self.model_bytes:
            return math.inf
        least = math.sqrt(self.card_seconds * rate / self.model_bytes)
        return max(least, rate / self.site.network_rate)

    def to_json(self) -> dict[str, Any]:
        """All of it; None for what is endless."""
        nowhere = [kind for kind in self.kinds if not kind.ways]
        limits = {
            "driver": self.driver_nodes,
            "storage": self.best_nodes(self.site.storage_rate),
            "model_distribution": self.best_nodes(self.site.network_rate),
        }
        return {
            "pictures": self.pictures,
            "nodes": self.nodes,
            "seconds": self.seconds,
            "hours": self.seconds / 3600,
            "cost": self.cost,
            "pictures_per_hour": self.per_hour,
            "bound": self.bound,
            "parts_seconds": self.parts,
            "nodes_at_most": {name: None if math.isinf(n) else n for name, n in limits.items()},
            "model_bytes": self.model_bytes,
            "driver_seconds": self.driver_seconds,
            "site": vars(self.site),
            "cards": [self._share(share) for share in self.shares],
            "nowhere": [
                {"pictures": kind.pictures, "rows": kind.rows, "reasons": kind.refusals} for kind in nowhere
            ],
        }

    def _share(self, share: Share) -> dict[str, Any]:
        """One card, with how it paints each kind."""
        kinds = []
        for kind, pictures in zip(self.kinds, share.pictures, strict=True):
            way = kind.ways.get(share.card.name)
            how = vars(way) if way else {"refusal": kind.refusals.get(share.card.name)}
            kinds.append({"row": kind.rows[0] if kind.rows else None, "pictures": pictures, **how})
        return {
            **vars(share.card),
            "pictures": sum(share.pictures),
            "painting_seconds": share.painting_seconds,
            "reading_seconds": share.reading_seconds,
            "busy": share.painting_seconds / (share.card.count * self.seconds) if self.seconds else 0.0,
            "kinds": kinds,
        }


def schedule(cards: Sequence[Card], kinds: Sequence[Kind], site: Site) -> Schedule:
    """Every picture that fits some card, on these nodes, in whatever order they are named. Each kind ends as
    soon as it can, but that all which read a model are taken to begin together, and that the last runs of
    several pictures are not divided."""
    named = sorted(cards, key=lambda card: card.name)
    nodes = _Nodes(named, site)
    placed = [nodes.paint(kind) for kind in kinds]
    shares = {
        card.name: Share(
            card,
            tuple(by_card[number] for by_card in placed),
            nodes.of(number, nodes.painting),
            nodes.of(number, nodes.reading),
        )
        for number, card in enumerate(named)
    }
    return Schedule(
        site=site,
        kinds=tuple(kinds),
        shares=tuple(shares[card.name] for card in cards),
        seconds=nodes.driver_end,
        painted_seconds=nodes.painted,
        reading_seconds=float(nodes.reading.max()),
        driver_seconds=sum(
            site.driver_seconds(kind) * sum(by_card) for kind, by_card in zip(kinds, placed, strict=True)
        ),
    )


class _Nodes:
    """Every node, and until when it is busy; and the driver."""

    def __init__(self, cards: Sequence[Card], site: Site) -> None:
        import numpy as np

        self._cards, self._site = cards, site
        self._card = np.repeat(np.arange(len(cards)), [card.count for card in cards])
        self.free, self.painting, self.reading = (np.zeros(len(self._card)) for _ in range(3))
        self._has: dict[str, np.ndarray] = {}
        self.painted = self.driver_end = 0.0

    def of(self, number: int, seconds: np.ndarray) -> float:
        """The sum of all nodes with card `number`."""
        return float(seconds[self._card == number].sum())

    def paint(self, kind: Kind) -> list[int]:
        """All of a kind; how many pictures each card paints."""
        import numpy as np

        ways = [kind.ways.get(card.name) for card in self._cards]
        if not kind.pictures or not any(ways):
            return [0] * len(ways)
        able = np.flatnonzero(np.array([way is not None for way in ways])[self._card])
        seconds, together = (
            np.array([getattr(way, name, 0) for way in ways])[self._card][able]
            for name in ("seconds", "together")
        )
        seconds = np.maximum(seconds, 1e-9)
        has = self._has.setdefault(kind.model, np.zeros(len(self._card), bool))
        reading = self._reading(kind, ~has[able], int(together.min()))
        free = self.free[able]
        count = taken(kind.pictures, free + reading, seconds)
        takes = count > 0
        self.free[able] += takes * reading + count * seconds
        self.painting[able] += count * seconds
        self.reading[able] += takes * reading
        has[able[takes]] = True
        first = (free + reading + np.minimum(count, together) * seconds)[takes].min()
        self._take_in(kind, float(first), float(self.free[able][takes].max()))
        return [int(count[self._card[able] == number].sum()) for number in range(len(ways))]

    def _reading(self, kind: Kind, is_new: np.ndarray, together: int) -> np.ndarray:
        """Seconds that each would read the model."""
        readers = min(int(is_new.sum()), math.ceil(kind.pictures / together))
        return is_new * self._site.reading_seconds(kind.model_bytes, readers)

    def _take_in(self, kind: Kind, first: float, last: float) -> None:
        """The driver takes what is painted between these moments."""
        each = self._site.driver_seconds(kind)
        self.driver_end = max(max(self.driver_end, first) + kind.pictures * each, last + each)
        self.painted = max(self.painted, last)


def taken(pictures: int, ready: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """How many pictures each node paints, so that the last is there as soon as can be. Node i begins at
    ready[i], and paints one in seconds[i]; where several could paint the last ones at the same moment, the
    first of them do.

    The earliest moment is searched at which as many can be there as are asked for, so that a million pictures
    cost as little as ten."""
    import numpy as np

    def made(moment: float) -> np.ndarray:
        return np.maximum(np.floor((moment - ready) / seconds * (1 + _PRECISE)), 0)

    low = float(ready.min())
    high = float((ready + seconds * pictures).min()) * (1 + 1e-9) + 1e-9
    while high - low > _PRECISE * max(1.0, abs(high)):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if made(middle).sum() >= pictures else (middle, high)
    before = made(low)
    last = made(high) - before  # are there at the same moment, and some of them are not needed
    earlier = np.cumsum(last) - last
    return (before + np.clip(pictures - before.sum() - earlier, 0, last)).astype(int)
