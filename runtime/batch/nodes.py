"""A crew of a Ray cluster's nodes: an actor for each GPU, or for each node without one. Ray is imported
when a crew is made, and nothing listens but what it has listening anyhow."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from .. import lean
from ..costs.known import KNOWN
from ..errors import TightfitError, first_line
from .ledger import Item
from .painting import News, Predicted
from .spread import Foreseen, Happened, Joined, Lost, Told
from .staging import Parcel, parts
from .worker import About, Setup, Worker, versions

BUDGET = "tightfit-budget"
"""The label of a Ray node that says how much it may take."""
_START_SECONDS = 120.0  # until the first node has imported what it needs: a minute from a cold disk
_OTHERS_SECONDS = 10.0  # after the first, until the batch is planned without the others
_EMPTY_SECONDS = 60.0  # without any node, until the batch gives up
_LOOK_SECONDS = 2.0  # between looks at which nodes there are
_WAIT_SECONDS = 1.0
_CONNECT_SECONDS = 10.0
_KNOWN = 100  # answers of a node that are kept: each job of a server is a group of its own
_TRIES = 3  # how often a node may fail to start
_ADDRESS = re.compile(r"auto|(?:[\w.-]+|\[[0-9a-fA-F:]+\]):\d{1,5}")
_INSTALL = "--ray needs a package that is not installed: pip install 'tightfit[cluster]'"
_Key = tuple[str, int]  # of a node, and of a GPU there


def slots(resources: Mapping[str, float], device: str) -> list[dict[str, float]]:
    """What each actor of a node reserves. A node without CPUs and GPUs, as some keep their head, has none."""
    cpus, gpus = resources.get("CPU", 0.0), int(resources.get("GPU", 0))
    if device == "cpu" or not gpus:
        return [{"num_cpus": cpus}] if cpus else []
    return [{"num_gpus": 1, "num_cpus": cpus // gpus or cpus / gpus}] * gpus


def at_once(answers: Mapping[str, Predicted | str]) -> Predicted:
    """What several machines take together: the plan of the fastest, and the seconds of a picture at the pace
    of all. Raises TightfitError where it runs on none."""
    known = [answer for answer in answers.values() if isinstance(answer, Predicted)]
    if known:
        pace = sum(1 / max(one.seconds, 1e-9) for one in known)
        return replace(min(known, key=lambda one: one.seconds), seconds=1 / pace)
    reasons = {str(answer) for answer in answers.values()}
    if len(reasons) == 1:
        raise TightfitError(f"it runs on no node: {reasons.pop()}")
    said = "; ".join(f"{name}: {answer}" for name, answer in answers.items())
    raise TightfitError(f"it runs on no node: {said}")


class _Actor(Worker):
    """What runs there, in a process of its own that is killed at the end: what dry runs found out is kept at
    once, so that the next one plans in seconds."""

    def __init__(self, setup: Setup, budget: str) -> None:
        lean.begin()  # torch and diffusers are not imported yet
        super().__init__(setup, budget)
        KNOWN.keep()

    def predicted(self, item: Item, count: int) -> Predicted | str:
        predicted = super().predicted(item, count)
        KNOWN.write()
        return predicted

    def news(self) -> tuple[list[News], bool]:
        news = super().news()
        lean.settle()  # all is imported, or nearly
        return news


@dataclass
class _Node:
    """One actor: what it is called, what it is asked now, and what it has answered."""

    name: str
    actor: Any
    asked: Any = None
    heed: Callable[[Any], object] = lambda _: None  # of the answer
    about: About | None = None
    begun: float = field(default_factory=time.monotonic)
    has_joined: bool = False
    known: dict[int, Predicted | str] = field(default_factory=dict)


class RayCrew:
    """Use as a context manager, or `close` it."""

    def __init__(
        self,
        address: str,
        setup: Setup,
        parcels: Sequence[Parcel] = (),
        note: Callable[[str], object] = lambda _: None,
    ) -> None:
        """address: "auto" for the cluster that this machine is in. parcels: models to send. note: called with
        what a person should know. Raises TightfitError where there is no such cluster."""
        self._ray = _connected(address)
        self._remote = self._ray.remote(_Actor)
        self._setup, self.note = setup, note
        self._parcels = {parcel.digest: parcel for parcel in parcels}
        self._parts: dict[str, list[tuple[str, Any]]] = {}
        self._nodes: dict[_Key, _Node] = {}
        self._names: dict[_Key, str] = {}
        self._failures: Counter[_Key] = Counter()
        self._refused: dict[_Key, str] = {}
        self._noted: set[str] = set()
        self._happened: list[Happened] = []
        self._expected: set[_Key] = set()  # of nodes that are there
        self._looked = -_LOOK_SECONDS
        self._seen = time.monotonic()  # when there was a node last

    def __enter__(self) -> RayCrew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the nodes go."""
        with suppress(self._ray.exceptions.RayError):  # of a cluster that is gone
            for node in self._nodes.values():
                self._ray.kill(node.actor)
        self._nodes.clear()
        self._ray.shutdown()

    # ------------------------------------------------------------------------------------ before any work

    def ready(self) -> dict[str, About]:
        """Wait for the nodes, and answer what each is. Raises TightfitError where none can paint."""
        start, first = time.monotonic(), 0.0
        while True:
            self._advance()
            now, joined = time.monotonic(), self._joined()
            first = first or (now if joined else 0.0)
            late = now - first > _OTHERS_SECONDS if joined else now - start > _START_SECONDS
            late &= not any(self._is_sent_to(node) for node in self._nodes.values())
            there = {key for key, node in self._nodes.items() if node.has_joined}
            if late or not self._expected - self._refused.keys() - there:
                break
        if not joined:
            reason = next(iter(self._refused.values()), "no node of it has a CPU or a GPU that is free")
            raise TightfitError(f"the Ray cluster cannot paint: {reason}")
        for node in self._nodes.values():
            if not node.has_joined:
                self.note(f"{node.name} is starting, or busy: it takes part once it can")
        return {node.name: node.about for node in joined if node.about}

    def predicted(self, item: Item, count: int) -> Predicted:
        """At the pace of all nodes. Raises TightfitError for a picture that runs on none."""
        nodes = self._joined()
        for node in nodes:
            self.predict(node.name, item, count)
        while any(node.asked is not None for node in nodes):
            self._advance()
        answers = {node.name: node.known[item.group] for node in nodes if item.group in node.known}
        if not answers:
            raise TightfitError("every node of the cluster was lost: look into its log, then go on")
        return at_once(answers)

    # ------------------------------------------------------------------------------------ a Crew

    @property
    def is_growing(self) -> bool:
        now = time.monotonic()
        return any(
            self._is_sent_to(node) or (not node.has_joined and now - node.begun < _START_SECONDS)
            for node in self._nodes.values()
        )

    @staticmethod
    def _is_sent_to(node: _Node) -> bool:
        """Whether models are on their way to it, which takes as long as it takes."""
        return node.about is not None and not node.has_joined

    def wait(self) -> Sequence[Happened]:
        if not self._happened:
            self._advance()
        if self._nodes:
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > _EMPTY_SECONDS:
            said = f"no node of the cluster has been left for {_EMPTY_SECONDS:.0f} seconds"
            raise TightfitError(f"{said}: start one, and the same command goes on")
        happened, self._happened = self._happened, []
        return happened

    def predict(self, node: str, item: Item, count: int) -> None:
        def heed(answer: Predicted | str) -> None:
            asked.known[item.group] = answer
            if len(asked.known) > _KNOWN:
                del asked.known[next(iter(asked.known))]
            self._happened.append(Foreseen(node, item.group, answer))
            self._note_refusals(item.group)

        asked = self._named(node)
        self._ask(asked, asked.actor.predicted.remote(item, count), heed)

    def paint(self, node: str, items: Sequence[Item]) -> None:
        painter = self._named(node)
        painter.actor.paint.remote(items)
        self._listen(painter)

    def stop(self, node: str) -> None:
        self._named(node).actor.stop.remote()

    def _listen(self, node: _Node) -> None:
        def heed(answer: Any) -> None:
            news, is_over = answer
            self._happened.append(Told(node.name, news, is_over))
            if not is_over:
                self._listen(node)

        self._ask(node, node.actor.news.remote(), heed)

    # ------------------------------------------------------------------------------------ nodes

    def _joined(self) -> list[_Node]:
        return [node for node in self._nodes.values() if node.has_joined]

    def _named(self, name: str) -> _Node:
        return next(node for node in self._nodes.values() if node.name == name)

    def _note_refusals(self, group: int) -> None:
        """Of what runs on others."""
        answers = {node.name: node.known[group] for node in self._joined() if group in node.known}
        if any(isinstance(answer, Predicted) for answer in answers.values()):
            for name, answer in answers.items():
                if isinstance(answer, str):
                    self._note_once(f"{name} leaves some rows to others: {answer}")

    def _note_once(self, said: str) -> None:
        if said not in self._noted:
            self._noted.add(said)
            self.note(said)

    @staticmethod
    def _ask(node: _Node, asked: Any, heed: Callable[[Any], object]) -> None:
        node.asked, node.heed = asked, heed

    def _advance(self) -> None:
        """Heed what nodes answer, and see which there are."""
        self._look()
        asked = {node.asked: key for key, node in self._nodes.items() if node.asked is not None}
        if not asked:
            time.sleep(_WAIT_SECONDS / 5)
            return
        first, _ = self._ray.wait([*asked], timeout=_WAIT_SECONDS)
        ready, _ = self._ray.wait([*asked], num_returns=len(asked), timeout=0) if first else ([], [])
        for answer in ready:
            self._heed(asked[answer], answer)

    def _heed(self, key: _Key, answer: Any) -> None:
        node = self._nodes[key]
        node.asked = None
        try:
            value = self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:
            self._refuse(key, first_line(error.cause if isinstance(error.cause, TightfitError) else error))
        except self._ray.exceptions.RayError as error:
            self._lose(key, str(error))
        else:
            node.heed(value)

    def _look(self) -> None:
        """Nodes that are new, or whose process has ended, are begun."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        alive = [entry for entry in self._ray.nodes() if entry["Alive"]]
        counts = {one["NodeID"]: len(slots(one["Resources"], self._setup.device)) for one in alive}
        self._expected = {(node, number) for node, count in counts.items() for number in range(count)}
        for key in self._nodes.keys() - self._expected:
            self._lose(key, "the node is gone")
        for entry in alive:
            for key, reserved in self._slots(entry):
                if key not in self._nodes:
                    self._begin(key, entry, reserved)

    def _slots(self, entry: Mapping[str, Any]) -> Iterator[tuple[_Key, Mapping[str, float]]]:
        """Of a node, those that are not refused. Where models are sent, the first actor takes them for the
        others."""
        every = enumerate(slots(entry["Resources"], self._setup.device))
        able = {key: one for number, one in every if (key := (entry["NodeID"], number)) not in self._refused}
        has_models = any(key in self._nodes and self._nodes[key].has_joined for key in able)
        yield from [*able.items()][: None if has_models or not self._parcels else 1]

    def _begin(self, key: _Key, entry: Mapping[str, Any], reserved: Mapping[str, float]) -> None:
        strategies = self._ray.util.scheduling_strategies
        where = strategies.NodeAffinitySchedulingStrategy(entry["NodeID"], soft=False)
        budget = entry.get("Labels", {}).get(BUDGET, "")
        actor = self._remote.options(scheduling_strategy=where, **reserved).remote(self._setup, budget)
        node = self._nodes[key] = _Node(self._name(key, entry), actor)
        self._introduce(key, node)

    def _introduce(self, key: _Key, node: _Node) -> None:
        self._ask(node, node.actor.about.remote(), lambda about: self._meet(key, node, about))

    def _name(self, key: _Key, entry: Mapping[str, Any]) -> str:
        """The same for the same, and no other's."""
        if key not in self._names:
            name = entry.get("NodeName") or entry["NodeManagerAddress"]
            others = {
                taken.partition(" GPU ")[0] for known, taken in self._names.items() if known[0] != key[0]
            }
            name = f"{name}/{key[0][:6]}" if name in others else name
            self._names[key] = f"{name} GPU {key[1]}" if int(entry["Resources"].get("GPU", 0)) > 1 else name
        return self._names[key]

    def _meet(self, key: _Key, node: _Node, about: About) -> None:
        if about.versions != versions():
            theirs, ours = (" on Python ".join(each) for each in (about.versions, versions()))
            self._refuse(key, f"it has tightfit {theirs}, and here is {ours}: install the same there")
        elif about.missing and node.about:
            self._refuse(key, "models that were sent did not come: look for room in its cache folder")
        elif about.missing:
            node.about = about
            self._send(key, node, about.missing)
        else:
            node.about, node.has_joined = about, True
            self._happened.append(Joined(node.name, about.machine))

    def _send(self, key: _Key, node: _Node, digests: Sequence[str]) -> None:
        """Have models put together there; each part is in the object store once."""
        ends = []
        for digest in digests:
            if digest not in self._parts:
                self._parts[digest] = [
                    (name, self._ray.put(part))
                    for name, file in self._parcels[digest].files.items()
                    for part in parts(file)
                ]
            # A part that fails fails the end, whose argument it is.
            added = [node.actor.add.remote(digest, name, part) for name, part in self._parts[digest]]
            ends.append(node.actor.finish.remote(digest, *added))
        last = node.actor.about.remote(*ends)
        self._ask(node, last, lambda about: self._meet(key, node, about))

    def _lose(self, key: _Key, error: str) -> None:
        node = self._drop(key)
        if node.has_joined:
            self.note(f"{node.name} was lost: others take what it had")
            return
        self._failures[key] += 1
        if self._failures[key] >= _TRIES:
            self._refused[key] = said = f"{node.name} cannot start ({_cause(error)})"
            self._note_once(said)

    def _refuse(self, key: _Key, reason: str) -> None:
        """Have no more to do with a node."""
        node = self._drop(key)
        self._refused[key] = said = f"{node.name}: {reason}"
        self._note_once(f"{said}; it takes no part")

    def _drop(self, key: _Key) -> _Node:
        node = self._nodes.pop(key)
        node.asked = None  # nothing answers any more
        self._ray.kill(node.actor)
        if node.has_joined:
            self._happened.append(Lost(node.name, ""))
        return node


def _cause(error: str) -> str:
    """Of what Ray says in many lines, the last that names an exception."""
    lines = [line.strip() for line in error.splitlines() if re.match(r"\s*\w*(Error|Exception)\b", line)]
    missing = next((line for line in lines if "No module named 'tightfit" in line), None)
    cure = ": install the tightfit of here there" if missing else ""
    return (missing or (lines[-1] if lines else error.splitlines()[0]))[:200] + cure


def _connected(address: str) -> Any:
    if not _ADDRESS.fullmatch(address):
        raise TightfitError(f"--ray {address[:80]} is no address: write auto, or such as 10.0.0.1:6379")
    if address != "auto":
        _check_answers(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Else it prints what its processes log of nodes that are lost, to standard output, where --json goes.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "(?s).*")
    try:
        ray = import_module("ray")
    except ImportError:
        raise TightfitError(_INSTALL) from None
    try:
        ray.init(address=address, namespace="tightfit", log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:
        raise TightfitError(_unreachable(address, str(error))) from None
    return ray


def _check_answers(address: str) -> None:
    """Raise TightfitError where nothing listens: Ray would try for a minute."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise TightfitError(
            f"no Ray cluster answers at {address} ({said}): `ray status` names its address"
        ) from None


def _unreachable(address: str, error: str) -> str:
    if "ersion mismatch" in error:
        pairs = re.findall(r"(Ray|Python): (\S+)", error)
        names = [f"{name} {version}" for name, version in pairs]
        theirs, ours = ", ".join(names[:2]), ", ".join(names[2:])
        return f"the cluster runs {theirs}, and here is {ours}: install the same"
    if "any running Ray instance" in error:
        return "no Ray cluster runs here: begin one by `ray start --head`, or give an address"
    return f"the Ray cluster at {address} cannot be reached ({(error.splitlines() or [''])[0][:200]})"
