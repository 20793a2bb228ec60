"""Nodes of a cluster as a crew: who takes part, who does not and why, and what is sent. Ray is played by
objects of this process, each of whose answers is there at once; test_worker.py has the real one."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tightfit.runtime.batch import nodes
from tightfit.runtime.batch.ledger import Item
from tightfit.runtime.batch.painting import Encoding, Predicted
from tightfit.runtime.batch.spread import Joined, Lost
from tightfit.runtime.batch.staging import Stage, parcel
from tightfit.runtime.batch.worker import Setup, Worker
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models.hub import BUILT_IN

OPTIONS = {"prompt": "a red heart", "width": 64, "height": 64, "num_inference_steps": 2, "seed": 1}
WISHES = {"precision": "fp32", "residency": "resident", "attention": "sdpa", "tiling": "whole"}


class Idle(Worker):
    """Plans and paints nothing."""

    def predicted(self, item, count):
        return Predicted(None, 1.0, 4) if item.model == "emoji" else "it is not here"  # type: ignore


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause):
        super().__init__(f"\x1b[36mray::Worker\x1b[39m\n{cause!r}")
        self.cause = cause


class Answer:
    def __init__(self, value):
        self.value = value


class Actor:
    """Its arguments and answers are pickled, as on a wire."""

    def __init__(self, ray, made):
        self._ray, self._made = ray, made

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda *given: Answer(self._called(name, given)))

    def _called(self, name, given):
        try:
            values = [self._ray.get(one) if isinstance(one, Answer) else one for one in given]
            if isinstance(self._made, Exception):
                raise self._made
            return pickle.loads(pickle.dumps(getattr(self._made, name)(*pickle.loads(pickle.dumps(values)))))
        except RayError as error:
            return error
        except Exception as error:
            return RayTaskError(error)


class Ray:
    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
    util = SimpleNamespace(
        scheduling_strategies=SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: node)
    )

    def __init__(self, *entries):
        self.entries, self.begun, self.puts = [*entries], [], 0
        self.broken: Any = None

    def nodes(self):
        return self.entries

    def remote(self, kind):
        def options(scheduling_strategy, **reserved):
            def begin(*given):
                self.begun.append((scheduling_strategy, reserved))
                return Actor(self, self.broken or kind(*given))

            return SimpleNamespace(remote=begin)

        return SimpleNamespace(options=options)

    def put(self, value):
        self.puts += 1
        return Answer(value)

    def get(self, answer):
        if isinstance(answer.value, RayError):
            raise answer.value
        return answer.value

    def wait(self, answers, num_returns=1, timeout=None):
        return [*answers][:num_returns], []

    def kill(self, actor):
        actor._made = RayError("The actor is dead")

    def shutdown(self):
        pass


def entry(number: int, **more: Any) -> dict[str, Any]:
    node = {
        "NodeID": f"{number:06d}ab",
        "Alive": True,
        "NodeName": "",
        "NodeManagerAddress": "10.0.0.1",
        "Labels": {},
    }
    return {**node, "Resources": {"CPU": 2.0}, **more}


@pytest.fixture
def crew_of(monkeypatch, tmp_path):
    """Makes a crew of nodes, which looks for others at once, and says its notes."""
    monkeypatch.chdir(Path.cwd())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(nodes, "_Actor", Idle)
    monkeypatch.setattr(nodes, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(nodes, "_EMPTY_SECONDS", 0.5)

    def made(ray, parcels=(), **setup):
        monkeypatch.setattr(nodes, "_connected", lambda address: ray)
        given = Setup(Encoding("x"), str(tmp_path), **{"device": "cpu", **setup})
        notes = []
        return nodes.RayCrew("auto", given, parcels, notes.append), notes

    return made


def item(model: str = "emoji") -> Item:
    return Item(1, 1, 1, model, WISHES, OPTIONS, "")


def test_each_node_has_its_budget_and_its_name(crew_of):
    labels = {"tightfit-budget": "700MiB"}
    ray = Ray(entry(1), entry(2, Labels=labels), entry(3, Resources={"memory": 1e9}), entry(4, Alive=False))
    crew, notes = crew_of(ray, budget="900MiB")
    abouts = crew.ready()
    assert {name: about.budget_bytes >> 20 for name, about in abouts.items()} == {
        "10.0.0.1": 900, "10.0.0.1/000002": 700,
    }  # fmt: skip
    assert not notes
    assert isinstance(crew.predicted(item(), 3), Predicted)
    with pytest.raises(TightfitError, match="runs on no node: it is not here"):
        crew.predicted(item("nowhere"), 3)
    joined = [one for one in crew.wait() if isinstance(one, Joined)]
    assert [one.node for one in joined] == [*abouts]


def test_what_a_node_has_answered_is_not_kept_for_ever(crew_of):
    """A server asks for each job."""
    crew, _ = crew_of(Ray(entry(1)))
    crew.ready()
    for group in range(nodes._KNOWN + 1):
        assert crew.predicted(replace(item(), group=group), 1)
    (node,) = crew._nodes.values()
    assert [*node.known] == [*range(1, nodes._KNOWN + 1)]


def test_a_model_is_sent_once_a_node(crew_of):
    packed = parcel(str(BUILT_IN["emoji"]))
    gpus = {"CPU": 4.0, "GPU": 2.0}
    ray = Ray(entry(1, Resources=gpus))
    crew, _ = crew_of(ray, [packed], staged=(("/not/here/emoji", packed.digest),), device="auto")
    assert sorted(crew.ready()) == ["10.0.0.1 GPU 0", "10.0.0.1 GPU 1"]
    assert ray.begun == [("000001ab", {"num_gpus": 1, "num_cpus": 2.0})] * 2
    assert ray.puts == len(packed.files)
    place = Stage().place(packed.digest)
    assert (
        place
        and (place / "model_index.json").read_bytes() == packed.files["emoji/model_index.json"].read_bytes()
    )


def test_other_gpus_of_a_node_whose_first_is_refused_take_the_model(crew_of):
    packed = parcel(str(BUILT_IN["emoji"]))
    ray = Ray(entry(1, Resources={"CPU": 4.0, "GPU": 3.0}))
    ray.broken = RayError("The actor died\nRuntimeError: this GPU is broken")
    crew, notes = crew_of(ray, [packed], staged=(("/not/here/emoji", packed.digest),), device="auto")
    while not crew._refused:
        crew._advance()
    ray.broken = None
    assert sorted(crew.ready()) == ["10.0.0.1 GPU 1", "10.0.0.1 GPU 2"]
    assert notes == ["10.0.0.1 GPU 0 cannot start (RuntimeError: this GPU is broken)"]
    assert Stage().place(packed.digest)


def test_who_takes_no_part_is_named_with_the_cure(crew_of, monkeypatch):
    crew, notes = crew_of(Ray(entry(1), entry(2, Labels={"tightfit-budget": "much"})))
    assert [*crew.ready()] == ["10.0.0.1"]
    assert len(notes) == 1 and "10.0.0.1/000002: " in notes[0] and "much" in notes[0]

    monkeypatch.setattr(nodes, "versions", lambda: ("0.9.9", "3.14.0"))
    crew, _ = crew_of(Ray(entry(1)))
    with pytest.raises(TightfitError, match=r"here is 0\.9\.9 on Python 3\.14\.0: install the same there"):
        crew.ready()

    ray = Ray(entry(1))
    ray.broken = RayError("The actor died\n  File x\nModuleNotFoundError: No module named 'tightfit'\n")
    crew, _ = crew_of(ray)
    with pytest.raises(TightfitError, match="No module named 'tightfit': install the tightfit of here there"):
        crew.ready()
    assert len(ray.begun) == 3


def test_a_process_that_ends_is_begun_again_and_a_node_that_goes_is_not(crew_of):
    ray = Ray(entry(1), entry(2))
    crew, notes = crew_of(ray)
    crew.ready()
    crew.wait()
    first = crew._nodes["000001ab", 0].actor
    ray.kill(first)
    crew.predict("10.0.0.1", item(), 1)
    happened = [*crew.wait(), *crew.wait(), *crew.wait()]
    assert [type(one) for one in happened] == [Lost, Joined]
    assert {one.node for one in happened} == {"10.0.0.1"}
    ray.entries = [entry(1, Alive=False), entry(2)]
    assert [(type(one), one.node) for one in crew.wait()] == [(Lost, "10.0.0.1")]
    assert notes == ["10.0.0.1 was lost: others take what it had"] * 2
    ray.entries = [entry(3)]
    assert {one.node for one in [*crew.wait(), *crew.wait()]} == {"10.0.0.1/000002", "10.0.0.1/000003"}
    ray.entries = []
    with pytest.raises(TightfitError, match="the same command goes on"):
        while True:
            crew.wait()


@pytest.mark.parametrize(
    "said, cure",
    [
        ("Could not find any running Ray instance. Please", "begin one by `ray start --head`"),
        ("Version mismatch: The cluster was started with:\n    Ray: 2.60.0\n    Python: 3.12.1\n"
         "This process on x was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n",
         "runs Ray 2.60.0, Python 3.12.1, and here is Ray 2.60.0, Python 3.11.7: install the same"),
        ("no\nway", "at 10.0.0.1:6379 cannot be reached (no)"),
    ],
)  # fmt: skip
def test_a_cluster_that_cannot_be_reached_is_one_line(said, cure):
    assert cure in nodes._unreachable("10.0.0.1:6379", said)
