"""What candidates cost is remembered by one Estimator, which threads share."""

from __future__ import annotations

import dataclasses
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tightfit.runtime.backends.torch import dryrun
from tightfit.runtime.machine.profiles import profile
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.planner import estimate
from tightfit.runtime.planner.choose import plan
from tightfit.runtime.planner.wishes import Wishes
from tightfit.runtime.request import Request


def forget() -> None:
    """So that all is followed anew."""
    estimate.ESTIMATOR.costs.clear()
    for cache in (dryrun._modules, dryrun._sizes_of, dryrun._traces):
        cache.clear()


@pytest.mark.parametrize(("side", "measured"), [(64, 7.6e-3), (96, 11.3e-3)])
def test_a_picture_takes_time_beside_its_networks(shallow_models, side, measured):
    """On a card that takes none for these: what batches of 16 emoji took, less calls of their networks."""
    card = profile("rtx-3060-12gb")
    endless = dict.fromkeys(card.rates, 1e30)
    card = dataclasses.replace(
        card, rates=endless, bandwidth=1e30, bus=1e30, read=1e30, call_seconds=0, operator_seconds=0
    )
    request = Request("a", width=side, height=side, num_inference_steps=4, num_images=16, scheduler="euler")
    one_way = Wishes(precision="fp16", residency="resident", tiling="whole", attention="sdpa", cfg="batched")
    (best, *_) = plan(card, inspect(shallow_models["sd1"]), request, one_way)
    assert best.predicted.seconds / 16 == pytest.approx(measured, rel=0.25)


def test_two_threads_plan_what_one_plans(shallow_models):
    """Different sizes of one model, begun at once, a few sizes each: the same plans as one after another."""
    card, spec = profile("rtx-3060-12gb"), inspect(shallow_models["sd1"])
    sizes = [[(64, 64), (128, 64)], [(64, 128), (192, 64)]]
    wishes = Wishes(precision="fp16", cfg="batched")

    def plans(turn: int, begun: threading.Barrier) -> list:
        begun.wait()
        return [
            plan(card, spec, Request("a", width=width, height=height), wishes)
            for width, height in sizes[turn]
        ]

    forget()
    after_another = [plans(turn, threading.Barrier(1)) for turn in range(2)]
    forget()
    begun = threading.Barrier(2)
    with ThreadPoolExecutor(2) as threads:
        at_once = list(threads.map(plans, range(2), [begun] * 2))
    assert at_once == after_another
    assert gc.isenabled()


def test_one_thread_at_a_time_follows_a_call(monkeypatch, shallow_models):
    """The module on `meta` is one for all sizes, and hooks are set on it while it is followed."""
    inside, most, footprint = [], [], dryrun.footprint

    def following(*of):
        inside.append(of)
        most.append(len(inside))
        try:
            return footprint(*of)
        finally:
            inside.pop()

    monkeypatch.setattr(dryrun, "footprint", following)
    forget()
    card, spec = profile("rtx-3060-12gb"), inspect(shallow_models["sd1"])
    with ThreadPoolExecutor(2) as threads:
        ask = lambda width: plan(card, spec, Request("a", width=width, height=64), Wishes(precision="fp16"))  # noqa: E731
        assert all(threads.map(ask, (64, 128)))
    assert set(most) == {1}
