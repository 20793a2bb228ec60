"""A fleet on paper, beside a simulation of it event by event, which shares no code with the planner."""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from tightfit.__main__ import app
from tightfit.runtime.batch.fleet import Card, Kind, Schedule, Site, Way, schedule
from tightfit.runtime.batch.kinds import cards_of
from tightfit.runtime.errors import TightfitError
from typer.testing import CliRunner

AT_ONCE = Site(1e30, 1e30, take_seconds=0.0, pixel_seconds=0.0)
"""Neither storage nor driver takes time."""


def kind(pictures: int, model_bytes: int = 0, model: str = "m", **ways: tuple[float, int]) -> Kind:
    """Of cards by their seconds a picture, and how many they take at once."""
    known = {name: Way(seconds, together, 0, "") for name, (seconds, together) in ways.items()}
    return Kind((1,), pictures, model, model_bytes, 512 * 512, known)


@dataclass
class Simulated:
    """What a run of events gives."""

    seconds: float = 0.0
    last_run_seconds: float = 0.0  # the longest run
    painted: list[tuple[int, int]] = field(default_factory=list)  # card and kind of each picture


def simulate(cards: Sequence[Card], kinds: Sequence[Kind], site: Site) -> Simulated:
    """Every event by itself: a node asks for work, has read a model, has painted a run; the driver has
    written a picture. All that read share the source equally, and each at most its own network."""
    nodes = [number for number, card in enumerate(cards) for _ in range(card.count)]
    left = [one.pictures for one in kinds]
    models: list[set[str]] = [set() for _ in nodes]
    unread: dict[int, float] = {}  # bytes, of nodes that read
    holding: dict[int, tuple[int, int]] = {}  # kind and pictures that a node took
    asking = [(0.0, node) for node in range(len(nodes))]
    paints: list[tuple[float, int]] = []
    arrivals: list[tuple[float, float]] = []
    done, now = Simulated(), 0.0

    def begin(node: int) -> None:
        number, count = holding[node]
        seconds = count * kinds[number].ways[cards[nodes[node]].name].seconds
        done.last_run_seconds = max(done.last_run_seconds, seconds)
        heapq.heappush(paints, (now + seconds, node))

    while asking or paints or unread:
        source = site.network_rate if site.staged else site.storage_rate
        rate = min(site.network_rate, source / len(unread)) if unread else 0.0
        moments = [queue[0][0] for queue in (asking, paints) if queue]
        moments += [now + min(unread.values()) / rate] if unread else []
        moment = min(moments)
        for node in unread:
            unread[node] -= rate * (moment - now)
        now = moment
        for node in [node for node, count in unread.items() if count <= 1e-6 * rate]:
            del unread[node]
            begin(node)
        while paints and paints[0][0] <= now:
            _, node = heapq.heappop(paints)
            number, count = holding.pop(node)
            done.painted += [(nodes[node], number)] * count
            pixels = kinds[number].pixels
            each = site.take_seconds + pixels * site.pixel_seconds + 1.8 * pixels / site.network_rate
            arrivals += [(now, each)] * count
            heapq.heappush(asking, (now, node))
        while asking and asking[0][0] <= now:
            _, node = heapq.heappop(asking)
            name = cards[nodes[node]].name
            number = next((n for n, one in enumerate(kinds) if left[n] and name in one.ways), None)
            if number is None:
                continue
            count = min(left[number], kinds[number].ways[name].together)
            left[number] -= count
            holding[node] = number, count
            if kinds[number].model in models[node] or not kinds[number].model_bytes:
                begin(node)
            else:
                models[node].add(kinds[number].model)
                unread[node] = kinds[number].model_bytes
    for arrived, each in arrivals:
        done.seconds = max(done.seconds, arrived) + each
    return done


def earliest(cards: Sequence[Card], kinds: Sequence[Kind]) -> list[tuple[int, int, float]]:
    """Card, kind and end of each picture, one after another on whichever node it is there first, which makes
    a kind end as soon as can be. Nothing is read."""
    free = [(0.0, card.name, number) for number, card in enumerate(cards) for _ in range(card.count)]
    done = []
    for which, one in enumerate(kinds):
        nodes = [(*node, one.ways[node[1]].seconds) for node in free if node[1] in one.ways]
        free = [node for node in free if node[1] not in one.ways]
        heap = [(start + seconds, name, number, seconds) for start, name, number, seconds in nodes]
        heapq.heapify(heap)
        for _ in range(one.pictures):
            end, name, number, seconds = heap[0]
            done.append((number, which, end))
            heapq.heapreplace(heap, (end + seconds, name, number, seconds))
        free += [(end - seconds, name, number) for end, name, number, seconds in heap]
    return done


FLEETS = {
    "one": ([Card("a", 1)], [kind(10, a=(2.0, 1))], AT_ONCE),
    "alike": ([Card("a", 7)], [kind(100, a=(2.0, 4))], AT_ONCE),
    "unlike": ([Card("a", 4), Card("b", 10)], [kind(1000, a=(2.4, 2), b=(24.2, 1))], AT_ONCE),
    "some fit one card": (
        [Card("a", 2), Card("b", 3)],
        [kind(90, a=(3.0, 8)), kind(400, a=(1.0, 16), b=(1.7, 5)), kind(77, b=(2.5, 2))],
        AT_ONCE,
    ),
    "more nodes than work": ([Card("a", 50)], [kind(3, 10**9, a=(1.0, 1))], Site(storage_rate=1e9)),
    "storage": ([Card("a", 40), Card("b", 20)], [kind(4000, 2 * 10**9, a=(2.0, 8), b=(5.0, 8))], Site(1e9)),
    "two models": (
        [Card("a", 6), Card("b", 3)],
        [kind(300, 10**9, "m", a=(2.0, 4), b=(3.0, 4)), kind(300, 10**9, "n", a=(2.0, 4), b=(1.0, 4))],
        Site(1e9, 2e9),
    ),
    "staged": ([Card("a", 30)], [kind(900, 10**9, a=(2.0, 8))], Site(1e10, 1e9, staged=True)),
    "driver": (
        [Card("a", 100)],
        [kind(5000, 10**8, a=(0.1, 4)), kind(2000, 10**8, a=(0.2, 2))],
        Site(take_seconds=0.02),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FLEETS)
def test_the_plan_is_as_the_simulation(name):
    cards, kinds, site = FLEETS[name]
    planned, simulated = schedule(cards, kinds, site), simulate(cards, kinds, site)
    slack = simulated.last_run_seconds
    assert len(simulated.painted) == sum(one.pictures for one in kinds) == planned.pictures
    assert abs(planned.seconds - simulated.seconds) <= slack + 0.02 * simulated.seconds
    for number, share in enumerate(planned.shares):
        together = max(way.together for one in kinds for way in one.ways.values())
        for which, count in enumerate(share.pictures):
            runs = max(together * (len(kinds) + 1), 0.02 * kinds[which].pictures)
            assert abs(count - simulated.painted.count((number, which))) <= runs
    if site is AT_ONCE:  # then it is exact
        pictures = earliest(cards, kinds)
        assert planned.seconds == pytest.approx(max(end for _, _, end in pictures))
        for number, share in enumerate(planned.shares):
            counts = [sum(one[:2] == (number, which) for one in pictures) for which in range(len(kinds))]
            assert share.pictures == tuple(counts)


@pytest.mark.parametrize("name", FLEETS)
def test_the_order_in_which_cards_are_named_is_nothing(name):
    cards, kinds, site = FLEETS[name]
    one, other = schedule(cards, kinds, site), schedule(cards[::-1], kinds, site)
    assert other == replace(one, shares=one.shares[::-1])
    assert [share.card for share in other.shares] == [*cards[::-1]]


def test_a_card_that_others_would_wait_for_is_left_out():
    fast, slow = Card("a", 2, 1.0), Card("b", 5, 9.0)
    one = kind(10, a=(1.0, 1), b=(7.0, 1))
    planned = schedule([fast, slow], [one], AT_ONCE)
    assert (planned.seconds, [share.pictures for share in planned.shares]) == (5.0, [(10,), (0,)])
    assert planned.cost == pytest.approx(2 * 5 / 3600)  # of those that paint
    more = kind(10, a=(1.0, 1), b=(4.0, 1))
    assert schedule([fast, slow], [more], AT_ONCE).seconds == 4.0
    reads = kind(10, 10**9, a=(1.0, 1), b=(4.0, 1))  # a second each, after which it is too late
    site = replace(AT_ONCE, network_rate=1e9)
    assert [share.pictures for share in schedule([fast, slow], [reads], site).shares] == [(8,), (2,)]


@pytest.mark.parametrize("name", FLEETS)
def test_no_plan_is_faster_than_its_limits(name):
    cards, kinds, site = FLEETS[name]
    planned = schedule(cards, kinds, site)
    names = {card.name: card.count for card in cards}
    if all(one.ways.keys() == names.keys() for one in kinds):
        least = sum(
            one.pictures / sum(count / one.ways[name].seconds for name, count in names.items())
            for one in kinds
        )
        assert planned.seconds >= least * (1 - 1e-9)
    assert planned.seconds >= planned.driver_seconds
    assert planned.seconds >= planned.reading_seconds
    assert planned.painted_seconds >= planned.card_seconds / planned.nodes
    for share in planned.shares:
        assert (
            share.painting_seconds + share.reading_seconds
            <= share.card.count * planned.painted_seconds + 1e-6
        )


def test_shares_are_as_the_speeds():
    planned = schedule([Card("a", 4), Card("b", 10)], [kind(100_000, a=(1.0, 4), b=(5.0, 4))], AT_ONCE)
    fast, slow = (sum(share.pictures) for share in planned.shares)
    assert fast / slow == pytest.approx(4 / (10 / 5), rel=1e-3)
    assert planned.seconds == pytest.approx(100_000 / (4 + 2), rel=1e-3)


def test_what_is_best_and_what_bounds():
    """More nodes than `best_nodes` take longer, as each reads the model; the driver bounds at
    `driver_nodes`."""
    one = kind(10_000, 2 * 10**9, a=(2.0, 1))
    by_count: dict[int, Schedule] = {
        n: schedule([Card("a", n)], [one], Site(1e9)) for n in range(10, 301, 10)
    }
    best = min(by_count, key=lambda n: by_count[n].seconds)
    assert best == pytest.approx(by_count[10].best_nodes(1e9), abs=10)
    assert (by_count[10].bound, by_count[300].bound) == ("painting", "reading models")
    site = replace(AT_ONCE, take_seconds=0.05)
    slow = schedule([Card("a", 10)], [kind(10_000, a=(2.0, 1))], site)
    assert slow.driver_nodes == pytest.approx(40)
    assert schedule([Card("a", 400)], [kind(10_000, a=(2.0, 1))], site).bound == "the driver"


def test_a_million_pictures_and_what_fits_nowhere():
    nowhere = Kind((3, 4), 2, "m", 0, 1, {}, {"a": "too large"})
    planned = schedule(
        [Card("a", 150, 0.5), Card("b", 50, 0.1)], [kind(10**6, a=(2.0, 16), b=(9.0, 3)), nowhere], AT_ONCE
    )
    assert planned.pictures == 10**6
    assert planned.cost == pytest.approx((150 * 0.5 + 50 * 0.1) * planned.seconds / 3600)
    said = planned.to_json()
    assert json.loads(json.dumps(said))["nowhere"] == [
        {"pictures": 2, "rows": [3, 4], "reasons": {"a": "too large"}}
    ]


def test_a_fleet_as_text():
    assert cards_of("rtx-3060-12gb:4@0.20/h, GTX-1650:10,m1-8gb", 0.35) == [
        Card("rtx-3060-12gb", 4, 0.2), Card("gtx-1650", 10, 0.35), Card("m1-8gb", 1, 0.35),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rtx-3060:4", "did you mean rtx-3060-12gb or rtx-3060-8gb"),
        ("gtx-1650:x", "--profiles is such as"),
        ("gtx-1650:0", "write gtx-1650:1"),
        ("gtx-1650:2,gtx-1650", "names gtx-1650 twice"),
        ("gtx-1650:99999", "10000 are the most"),
        ("gtx-1650@cheap", "--profiles must be dollars an hour"),
        ("", "--profiles is such as"),
    ],
)
def test_what_is_no_fleet(text, said):
    with pytest.raises(TightfitError, match=said):
        cards_of(text)


def test_the_command(tmp_path):
    """Each card by its own plan; rows that fit nowhere by their numbers."""
    rows = [
        {"prompt": "a", "seed": "1..40", "width": 64, "height": 64},
        {"prompt": "b", "width": 4096, "height": 4096, "seed": 1},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ways = ["--residency", "resident", "--attention", "sdpa", "--tiling", "whole", "--precision", "fp32"]
    fleet = ["cluster", "plan", "--profiles", "rtx-3060-12gb:2@0.2,cpu-8gb:3@0.1", str(tmp_path / "t.jsonl")]
    result = CliRunner().invoke(app(), [*fleet, *ways, "--json"])
    assert result.exit_code == 1, result.output
    said = json.loads(result.stdout)
    assert (said["pictures"], said["nodes"], said["measured"]) == (40, 5, False)
    fast, slow = ([kind for kind in card["kinds"] if "seconds" in kind] for card in said["cards"])
    assert [kind["row"] for kind in (*fast, *slow)] == [1, 1]
    assert fast[0]["seconds"] < slow[0]["seconds"]
    assert said["nowhere"][0]["rows"] == [2]
    assert sum(card["pictures"] for card in said["cards"]) == 40
    assert [*tmp_path.iterdir()] == [tmp_path / "t.jsonl"]
