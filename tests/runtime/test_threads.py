"""Pipelines in threads: the pictures are those made alone, one run at a time; what is loaded gives way to
what runs."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import tightfit
from tightfit.runtime.backends.torch.meter import CountingMeter
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.planner.wishes import Wishes

REQUESTS = [
    tightfit.Request("a cat", seed=seed, num_inference_steps=2, width=64, height=64) for seed in range(3)
]
STAGES = ["prepare", "encode", "denoise", "decode"]


def painted(pipe: tightfit.Pipeline, requests=tuple(REQUESTS)) -> list[bytes]:
    return [pipe.generate(request).images[0].tobytes() for request in requests]


def pipeline(folder, residency: str = "resident", **options) -> tightfit.Pipeline:
    """On the CPU, of which `room_bytes` beside the process are free, if they are given."""
    here = Hardware.detect("cpu")
    if room_bytes := options.pop("room_bytes", None):
        here = dataclasses.replace(here, free_bytes=here.context_bytes + room_bytes)
    return tightfit.Pipeline(
        inspect(str(folder)), here, Wishes(precision="fp32", residency=residency), **options
    )


@pytest.fixture(scope="module")
def alone(tiny_models):
    """Each request's picture, by family, from a pipeline that nobody else was beside."""
    pictures = {}
    for family in ("sd1", "sdxl"):
        with pipeline(tiny_models[family]) as pipe:
            pictures[family] = painted(pipe)
    return pictures


class Watch:
    """The stages of all pipelines, as they begin: (pipeline, stage)."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, str]] = []
        self.open = self.most = 0

    def of(self, name: str):
        @contextmanager
        def stage(stage: str):
            self.begun.append((name, stage))
            self.open += 1
            self.most = max(self.most, self.open)
            yield
            self.open -= 1

        return stage

    def check(self, runs: int) -> None:
        """Every run was whole before the next began."""
        assert self.most == 1
        assert len(self.begun) == len(STAGES) * runs
        for start in range(0, len(self.begun), len(STAGES)):
            part = self.begun[start : start + len(STAGES)]
            assert [stage for _, stage in part] == STAGES
            assert len({name for name, _ in part}) == 1


@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_two_pipelines_in_two_threads(tiny_models, alone, residency):
    watch, families = Watch(), ("sd1", "sdxl")
    pipes = [pipeline(tiny_models[family], residency, on_stage=watch.of(family)) for family in families]
    with pipes[0], pipes[1], ThreadPoolExecutor(2) as threads:
        made = list(threads.map(painted, pipes))
    assert made == [alone[family] for family in families]
    watch.check(6)


def test_one_pipeline_asked_from_three_threads(sd1, alone):
    watch = Watch()
    with pipeline(sd1, on_stage=watch.of("sd1")) as pipe, ThreadPoolExecutor(3) as threads:
        made = list(threads.map(lambda request: painted(pipe, [request])[0], REQUESTS))
    assert made == alone["sd1"]
    watch.check(3)


def test_planned_while_it_paints(sd1, alone):
    """By another thread, and for other sizes; the run keeps its own plan."""
    with pipeline(sd1) as pipe, ThreadPoolExecutor(1) as threads:
        sizes = [dataclasses.replace(REQUESTS[0], width=width) for width in (72, 80, 88)]
        plans = threads.submit(lambda: [pipe.plans(request)[0] for request in sizes])
        assert painted(pipe) == alone["sd1"]
        assert all(plan.chosen for plan in plans.result())


def test_a_second_run_in_one_thread_is_refused(tiny_models, alone):
    with pipeline(tiny_models["sd1"]) as one, pipeline(tiny_models["sdxl"]) as other:
        events = one.run(REQUESTS[0])
        next(events)
        for pipe, whose in ((one, "this pipeline"), (other, "another pipeline of this thread")):
            with pytest.raises(
                TightfitError, match=f"^{whose} is painting already: finish or close that run first$"
            ):
                painted(pipe)
        assert [event.result for event in events][-1].images[0].tobytes() == alone["sd1"][0]
        assert painted(other) == alone["sdxl"]


def test_a_run_that_threads_advance_in_turns(sd1, alone):
    """As a server with a pool of threads does."""
    with pipeline(sd1) as pipe:
        events, made = pipe.run(REQUESTS[0]), []
        while not made or made[-1].result is None:
            with ThreadPoolExecutor(1) as thread:
                made.append(thread.submit(next, events).result())
        events.close()
        assert made[-1].result.images[0].tobytes() == alone["sd1"][0]
        assert painted(pipe) == alone["sd1"]


def test_closing_lets_the_next_one_run(tiny_models, alone):
    """A run that was left in the middle ends with its pipeline, and touches nothing of the next run."""
    with (
        pipeline(tiny_models["sd1"]) as one,
        pipeline(tiny_models["sdxl"]) as other,
        ThreadPoolExecutor(1) as threads,
    ):
        left = one.run(REQUESTS[0])
        next(left), next(left)
        waiting = threads.submit(painted, other)
        one.close()
        assert waiting.result(timeout=120) == alone["sdxl"]
        again = one.run(REQUESTS[1])
        next(again), next(again)
        with pytest.raises(TightfitError, match="closed while it was painting"):
            next(left)
        assert [event.result for event in again][-1].images[0].tobytes() == alone["sd1"][1]


def test_closed_by_another_thread_between_two_events(sd1):
    with pipeline(sd1) as pipe:
        begun, closed = threading.Event(), threading.Event()

        def paint() -> str:
            try:
                for _ in pipe.run(REQUESTS[0]):
                    begun.set()
                    closed.wait(60)
            except TightfitError as error:
                return str(error)
            return "painted"

        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(paint)
            assert begun.wait(120)
            pipe.close()
            closed.set()
            assert running.result() == "the pipeline was closed while it was painting"
        assert not pipe.loaded.sessions


def test_what_is_loaded_gives_way(tiny_models, alone):
    """Where two models fit one at a time, what stays loaded of the first is freed for the second; else both
    stay."""
    with pipeline(tiny_models["sdxl"]) as probe:
        peak_bytes = probe.plans(REQUESTS[0])[0].predicted.peak_bytes
    for factor, stays in ((1.05, False), (3, True)):
        room_bytes = int(peak_bytes * factor)
        pipes = {family: pipeline(tiny_models[family], room_bytes=room_bytes) for family in ("sd1", "sdxl")}
        with pipes["sd1"] as one, pipes["sdxl"] as other:
            assert painted(one) == alone["sd1"]
            held_bytes = one.loaded.held()
            assert painted(other) == alone["sdxl"]
            assert one.loaded.held() == (held_bytes if stays else 0) < room_bytes
            assert painted(one) == alone["sd1"]
            assert one.loaded.held() + other.loaded.held() <= room_bytes


def test_each_run_sets_its_own_limit(tiny_models, monkeypatch):
    """torch's allocator has one cap for the process: a pipeline's second run has its own again, though it has
    not changed."""
    limits, limit = [], CountingMeter.limit
    monkeypatch.setattr(
        CountingMeter, "limit", lambda self, count: limits.append(count) or limit(self, count)
    )
    mib = 2**20
    rooms = {"sd1": 900 * mib, "sdxl": 1100 * mib}
    pipes = {
        family: pipeline(tiny_models[family], "staged", room_bytes=room) for family, room in rooms.items()
    }
    with pipes["sd1"] as one, pipes["sdxl"] as other:
        for pipe, room in ((one, 900 * mib), (other, 1100 * mib), (one, 900 * mib)):
            pipe.generate(REQUESTS[0])
            assert limits[-1] == room
        left = other.run(REQUESTS[0])
        next(left)
        limits.clear()
        one.close()
        assert not limits  # the other's cap stays while it runs
        left.close()
        one.close()
        assert limits == [None]


def test_networks_that_another_request_has_no_use_for(sd1):
    """They are freed when a plan comes that does not know them."""
    with pipeline(sd1) as pipe:
        result = pipe.generate(REQUESTS[0])
        fewer = {
            name: placement for name, placement in result.plan.placements.items() if name != "text_encoder"
        }
        assert "text_encoder" in pipe.loaded.sessions
        pipe.loaded.take(dataclasses.replace(result.plan, placements=fewer), pipe.spec)
        assert pipe.loaded.sessions.keys() == fewer.keys()


def test_stages_are_told(sd1):
    """Begun and ended, also where a run is given up."""
    told: list[str] = []

    @contextmanager
    def stage(name: str):
        told.append(name)
        try:
            yield
        finally:
            told.append(f"/{name}")

    with pipeline(sd1, on_stage=stage) as pipe:
        pipe.generate(REQUESTS[0])
        assert told == [word for name in STAGES for word in (name, f"/{name}")]
        told.clear()
        left = pipe.run(REQUESTS[0])
        next(left), next(left)
        left.close()
        assert told == ["prepare", "/prepare", "encode", "/encode", "denoise", "/denoise"]
