"""One batch over machines that differ: each picture once, whoever takes it, and whoever is lost."""

from __future__ import annotations

import heapq
import itertools
import signal
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from tightfit.runtime.batch.ledger import ENDED, Ledger, Measures
from tightfit.runtime.batch.nodes import at_once, slots
from tightfit.runtime.batch.painting import Encoded, Predicted, Took
from tightfit.runtime.batch.report import Report, reported
from tightfit.runtime.batch.requests import Reading
from tightfit.runtime.batch.spread import Foreseen, Joined, Lost, Spread, Told
from tightfit.runtime.errors import TightfitError

TOGETHER = 4
POISON = 13  # a seed


@dataclass
class Machine:
    """Seconds of a picture, and of one of some models; when it joins, and is lost; which models it has not;
    whether its process ends at the poisoned picture, and begins again after a second; joules of a picture."""

    seconds: float
    joins: float = 0.0
    dies: float = 1e9
    lacks: tuple[str, ...] = ()
    is_poisoned: bool = False
    seconds_of: dict[str | None, float] = field(default_factory=dict)
    joules: float | None = None

    def of(self, item):
        return self.seconds_of.get(item.model, self.seconds)


@dataclass
class Machines:
    """A crew in a time of its own. `note` hears nothing. are_together: what happens at a time is heard at
    once."""

    machines: dict[str, Machine]
    are_together: bool = False
    now: float = 0.0
    note: Any = None
    painted: list[tuple[str, int]] = field(default_factory=list)
    sizes: list[tuple[str, int]] = field(default_factory=list)
    _order: Any = field(default_factory=itertools.count)
    _events: list[tuple[float, int, Any]] = field(default_factory=list)
    _lives: Counter = field(default_factory=Counter)
    _stopped: set[str] = field(default_factory=set)

    def __post_init__(self):
        for name, machine in self.machines.items():
            self._later(machine.joins, Joined(name, "a machine"))
            self._later(machine.dies, Lost(name, "gone"))

    def _later(self, when, event, life=None):
        heapq.heappush(self._events, (when, next(self._order), (event, life)))

    @property
    def is_growing(self):
        return any(isinstance(event, Joined) for _, _, (event, _) in self._events)

    def predicted(self, item, count):
        raise NotImplementedError

    def wait(self):
        if not self._events:
            raise TightfitError("no machine is left")
        self.now, _, (event, life) = heapq.heappop(self._events)
        if life is not None and life != self._lives[event.node]:
            return []
        if isinstance(event, Lost):
            self._lives[event.node] += 1
        more = self.wait() if self.are_together and self._events[0][0] == self.now else ()
        return [event, *more]

    def predict(self, node, item, count):
        machine = self.machines[node]
        says = "it has not that model" if item.model in machine.lacks else None
        known = says or Predicted(None, machine.of(item), min(count, TOGETHER))  # type: ignore
        self._later(self.now, Foreseen(node, item.group, known), self._lives[node])

    def paint(self, node, items):
        machine, life, when = self.machines[node], self._lives[node], self.now
        self.sizes.append((node, len(items)))
        for item in items:
            when += machine.of(item)
            if machine.is_poisoned and item.options["seed"] == POISON:
                self._later(when, Lost(node, "ended"), life)
                self._later(when + 1, Joined(node, "a machine"))
                return
            self.painted.append((node, item.options["seed"]))
            # Of a machine that has its own idea of what was asked.
            theirs = replace(item, row=-1, name="/etc/passwd")
            made = Encoded(theirs, b"%d" % item.options["seed"], "")
            self._later(when, Told(node, [made], False), life)
        seconds = machine.of(items[0])
        took = Took(tuple(items), Measures(seconds, seconds, 1, "a plan", machine.joules))
        self._later(when, Told(node, [took], True), life)

    def stop(self, node):
        self._stopped.add(node)


class Numbered:
    def __init__(self, folder):
        self._folder = folder

    def encoded(self, made):
        raise NotImplementedError

    def __call__(self, encoded):
        assert encoded.item.row > 0 and not encoded.item.name
        return self._folder / f"{encoded.item.number}.png"

    def copied(self, item, file):
        return self._folder / f"{item.number}.png"


def run(
    folder: Path, crew: Machines, rows: list[dict[str, Any]], is_planned: bool = False, **how: Any
) -> Any:
    """Spread, and answer the report; all machines may be asked about all groups before. Each picture that is
    there is there once."""
    with Ledger(folder) as ledger:
        assert not ledger.ask(Reading().pictures(iter(enumerate(rows, 1))))
        work = Spread(ledger, Numbered(folder), crew=crew, clock=lambda: crew.now, **how)
        ledger.resume(work.retries)
        for group, count in ledger.groups() if is_planned else ():
            for name in crew.machines:
                crew.predict(name, ledger.peek(group), count)
        try:
            work.run()
        finally:
            report = reported(work, 0, crew.now or 1, None).to_json()
            done = [one for one in ledger.records() if one["state"] == "done"]
            assert sorted(one["file"] for one in done) == sorted(file.name for file in folder.glob("*.png"))
            assert len(done) == report["done"]
            assert work.painted == sum(node["painted"] for node in report["nodes"])
            assert "running" not in ledger.counts()
    return report


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": "a heart", "seed": seed, **more} for seed in range(count)]


def test_a_slow_machine_takes_less_and_all_end_together(tmp_path):
    crew = Machines({"fast": Machine(1.0), "slow": Machine(10.0)})
    report = run(tmp_path, crew, rows(110))
    assert report["done"] == 110
    assert sorted(seed for _, seed in crew.painted) == list(range(110))
    painted = {node["node"]: node["painted"] for node in report["nodes"]}
    assert 8 <= painted["slow"] <= 12  # a tenth of the other's
    assert crew.now <= 1.1 * 100  # both without a break take 100 s
    assert crew.sizes[0] == ("fast", TOGETHER)


def test_energy_is_of_those_that_measure_it(tmp_path):
    crew = Machines({"a": Machine(1.0, joules=5.0), "b": Machine(1.0)})
    report = run(tmp_path, crew, rows(24))
    count = next(node["painted"] for node in report["nodes"] if node["node"] == "a")
    assert 0 < count < 24
    assert (report["joules"], report["joules_pictures"]) == (5.0 * count, count)
    said = Report({}, 24, 1.0, {**report, "seconds": 24.0}, [], [], None).lines()
    assert f"energy of {count} of the pictures: {5 * count / 3600:.3g} Wh, 5 J each" in said


def test_a_machine_far_slower_leaves_the_last_ones_to_others(tmp_path):
    crew = Machines({"fast": Machine(1.0), "slow": Machine(1000.0)})
    assert run(tmp_path, crew, rows(20))["done"] == 20
    assert crew.now < 25
    alone = Machines({"slow": Machine(1000.0)})
    assert run(tmp_path / "alone", alone, rows(3))["done"] == 3


@pytest.mark.parametrize(("ours", "theirs"), [(12, 12), (10, 13), (1, 1)])
def test_each_machine_slow_at_what_the_other_is_fast_at(tmp_path, ours, theirs):
    """Neither waits for the other's: it goes on with its own."""
    machines = {"a": Machine(1.0, seconds_of={"m": 20.0}), "b": Machine(20.0, seconds_of={"m": 1.0})}
    crew = Machines(machines, are_together=True)
    table = [*rows(ours), *rows(theirs, model="m")]
    assert run(tmp_path, crew, table, is_planned=True)["done"] == ours + theirs


def test_what_a_lost_machine_had_is_taken_by_others_and_a_new_one_takes_part(tmp_path):
    crew = Machines({"a": Machine(1.0), "b": Machine(1.0, dies=20.5), "c": Machine(1.0, joins=30)})
    report = run(tmp_path, crew, rows(100))
    assert report["done"] == 100
    twice = [seed for seed, count in Counter(seed for _, seed in crew.painted).items() if count > 1]
    assert len(twice) <= TOGETHER  # what it had in hand
    assert min(node["painted"] for node in report["nodes"]) >= 15
    assert [node["lost"] for node in report["nodes"]] == [0, 1, 0]


def test_a_picture_that_ends_processes_fails_alone(tmp_path):
    machines = {name: Machine(1.0, is_poisoned=True) for name in "ab"}
    crew = Machines(machines)
    report = run(tmp_path, crew, rows(30), retries=1)
    assert (report["done"], report["failed"]) == (29, 1)
    assert f"ended, {ENDED + 1} times" in report["failures"][0]["error"]
    assert sum(node["lost"] for node in report["nodes"]) == ENDED + 1
    assert TOGETHER >= report["begun_again"] - (ENDED - 1) >= 1  # its own run's, then it alone


def test_rows_go_where_their_model_is(tmp_path):
    crew = Machines({"a": Machine(1.0, lacks=("m", "n")), "b": Machine(5.0, lacks=("n",))})
    table = [*rows(10), *rows(10, model="m"), *rows(2, model="n")]
    report = run(tmp_path, crew, table)
    assert (report["done"], report["failed"]) == (20, 2)
    assert {one["error"] for one in report["failures"]} == {"it has not that model"}
    assert {node["node"]: node["painted"] for node in report["nodes"]}["b"] >= 10


def test_without_any_machine_the_same_command_goes_on(tmp_path):
    crew = Machines({"a": Machine(1.0, dies=5.5)})
    with pytest.raises(TightfitError, match="no machine is left"):
        run(tmp_path, crew, rows(10))
    report = run(tmp_path, Machines({"b": Machine(1.0)}), rows(10))
    assert (report["done"], report["painted"]) == (10, 5)


@pytest.fixture
def foreground():
    """A background job of a shell ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_keeps_what_is_painted(tmp_path, foreground):
    crew = Machines({"a": Machine(1.0), "b": Machine(1.0)})
    wait = crew.wait

    def interrupted():
        if crew.now == 3 and not crew._stopped:
            heard: Any = signal.getsignal(signal.SIGINT)  # at once, in this thread; a signal may come later
            heard(signal.SIGINT, None)
        return wait()

    crew.wait = interrupted
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, crew, rows(30))
    assert signal.getsignal(signal.SIGINT) is before
    assert crew._stopped == {"a", "b"}
    assert len([*tmp_path.glob("*.png")]) == 2 * TOGETHER  # of what was in hand all, and no more
    assert run(tmp_path, Machines({"a": Machine(1.0)}), rows(30))["painted"] == 30 - 2 * TOGETHER


def test_each_gpu_is_an_actor_and_a_head_without_either_is_none():
    assert slots({"CPU": 8.0}, "auto") == [{"num_cpus": 8.0}]
    assert slots({"CPU": 8.0, "GPU": 2.0}, "auto") == [{"num_gpus": 1, "num_cpus": 4.0}] * 2
    assert slots({"CPU": 2.0, "GPU": 4.0}, "auto") == [{"num_gpus": 1, "num_cpus": 0.5}] * 4
    assert slots({"CPU": 8.0, "GPU": 2.0}, "cpu") == [{"num_cpus": 8.0}]
    assert slots({"memory": 1e9}, "auto") == []


def test_several_machines_have_the_pace_of_all():
    fast, slow = (Predicted(name, seconds, 4) for name, seconds in (("f", 2.0), ("s", 6.0)))  # type: ignore
    both = at_once({"a": slow, "b": fast, "c": "too large"})
    assert (both.plan, both.seconds) == ("f", pytest.approx(1.5))
    with pytest.raises(TightfitError, match=r"runs on no node: too large$"):
        at_once({"a": "too large", "b": "too large"})
    with pytest.raises(TightfitError, match="a: too large; b: no such model"):
        at_once({"a": "too large", "b": "no such model"})
