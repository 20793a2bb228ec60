"""Out of memory at every stage and step: the run goes on with less, and paints the same picture; the budget
is held."""

from __future__ import annotations

import dataclasses

import pytest
import tightfit
from tightfit.benchmarks.parity import psnr
from tightfit.runtime.backends.torch.backend import TorchBackend, TorchSession
from tightfit.runtime.errors import OutOfMemoryError, TightfitError
from tightfit.runtime.machine import detect
from tightfit.runtime.machine.hardware import GIB, Hardware
from tightfit.runtime.machine.process import ProcessPeak
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.placement import ATTENTIONS, CFG, RESIDENCIES, TILINGS
from tightfit.runtime.planner.wishes import Wishes
from tightfit.runtime.run import Run

STEPS = 3
REQUEST = tightfit.Request(
    "a cat", seed=1, num_inference_steps=STEPS, scheduler="euler_a", width=128, height=128
)
MIB = 2**20


@pytest.fixture(scope="module")
def whole(tiny_models):
    """The picture that nothing interrupted, by family."""
    pictures = {}
    for family in ("sd1", "sdxl"):
        with tightfit.load(str(tiny_models[family]), precision="fp32", device="cpu") as pipe:
            pictures[family] = pipe.generate(REQUEST).images[0]
    return pictures


def failing(monkeypatch, numbers, method="__call__"):
    """The calls of sessions (or loads of components) with these numbers, from 0, run out of memory; answers
    how many there were."""
    kind = TorchSession if method == "__call__" else TorchBackend
    count, original = [0], getattr(kind, method)

    def call(*args, **kwargs):
        count[0] += 1
        if count[0] - 1 in numbers:
            raise OutOfMemoryError("injected")
        return original(*args, **kwargs)

    monkeypatch.setattr(kind, method, call)
    return count


@pytest.mark.parametrize(("family", "calls"), [("sd1", range(2 + STEPS + 1)), ("sdxl", (0, 3, 5, 7))])
def test_at_every_call(tiny_models, whole, monkeypatch, family, calls):
    """Two texts (of SDXL's four the first and the last), steps, the decoding: the picture stays the same, and
    it is said once."""
    with tightfit.load(str(tiny_models[family]), precision="fp32", device="cpu") as pipe:
        for number in calls:
            with monkeypatch.context() as patch:
                failing(patch, {number})
                events = list(pipe.run(REQUEST))
            result = events[-1].result
            assert psnr(result.images[0], whole[family]) > 75
            (notice,) = result.notices
            assert notice.startswith("out of memory to ")
            assert [notice] == [each for event in events for each in event.notices]
            assert [e.step for e in events if e.stage == "denoise"] == [1, 2, 3]


def test_on_every_rung(tiny_models, whole, monkeypatch):
    """Every call fails until the last rung: each plan takes less than the one before, and then it is said
    that none does."""
    taken = []
    original = Run._take
    monkeypatch.setattr(Run, "_take", lambda self, plan: (taken.append(plan), original(self, plan))[1])
    with tightfit.load(str(tiny_models["sd1"]), precision="fp32", device="cpu") as pipe:
        for stage, first in (("denoise", 2), ("decode", 2 + STEPS)):
            taken.clear()
            with monkeypatch.context() as patch:
                count = failing(patch, range(first, 10_000))
                with pytest.raises(
                    OutOfMemoryError, match=f"out of memory to {stage} .injected., and no plan takes less"
                ):
                    pipe.generate(REQUEST)
            needs = [plan.predicted.stages[stage] for plan in taken]
            assert len(needs) > 2
            assert needs == sorted(set(needs), reverse=True)
            rungs = count[0] - first
            for fails in {1, rungs // 2, rungs - 1}:
                with monkeypatch.context() as patch:
                    failing(patch, range(first, first + fails))
                    result = pipe.generate(REQUEST)
                assert psnr(result.images[0], whole["sd1"]) > 75
                assert len(result.notices) == fails


@pytest.mark.parametrize("number", range(3))
def test_while_loading(tiny_models, whole, monkeypatch, number):
    failing(monkeypatch, {number}, "load")
    with tightfit.load(str(tiny_models["sd1"]), precision="fp32", device="cpu") as pipe:
        result = pipe.generate(REQUEST)
    assert psnr(result.images[0], whole["sd1"]) > 75
    assert len(result.notices) == 1


def test_a_prediction_that_is_too_low(tiny_models, whole, monkeypatch):
    """The meter stops what takes more than the budget, though the plan said it would fit."""
    with tightfit.load(str(tiny_models["sd1"]), precision="fp32", device="cpu") as pipe:
        best, *others = pipe.plans(REQUEST)
        tight = best.predicted.context_bytes + best.predicted.peak_bytes - 1
        pipe._planned = (
            pipe._planned[0],
            [dataclasses.replace(p, budget_bytes=tight) for p in (best, *others)],
        )
        result = pipe.generate(REQUEST)
    assert result.plan.placements != best.placements
    assert result.peak_bytes <= best.predicted.peak_bytes
    assert "are allowed" in result.notices[0]
    assert psnr(result.images[0], whole["sd1"]) > 75


# Any two choices meet: an orthogonal array of four columns, 9 ways in place of 36.
WAYS = [
    (residency, attention, CFG[(i + j) % 3 % 2], TILINGS[(i + 2 * j) % 3 % 2])
    for i, residency in enumerate(RESIDENCIES)
    for j, attention in enumerate(ATTENTIONS)
]


@pytest.mark.parametrize(("residency", "attention", "cfg", "tiling"), WAYS)
def test_every_way_paints_the_same_and_takes_what_was_predicted(
    tiny_models, whole, residency, attention, cfg, tiling
):
    choices = {"residency": residency, "attention": attention, "cfg": cfg, "tiling": tiling}
    with tightfit.load(str(tiny_models["sd1"]), precision="fp32", device="cpu", **choices) as pipe:
        result = pipe.generate(REQUEST)
        if residency == "resident":  # in the second run all that stays is loaded
            result = pipe.generate(REQUEST)
    assert psnr(result.images[0], whole["sd1"]) > 75
    for stage, predicted in result.plan.predicted.stages.items():
        assert result.stages[stage].peak_bytes == pytest.approx(predicted, rel=0.05), stage


@pytest.mark.parametrize("share", [0.25, 0.7])
def test_what_streams_with_some_kept_takes_what_was_predicted(tiny_models, whole, share):
    """Between all that is streamed and all that is staged, to the byte; the same picture."""
    choices = {"precision": "fp32", "attention": "sdpa", "cfg": "batched", "tiling": "tiled"}
    with tightfit.load(str(tiny_models["sdxl"]), device="cpu", **choices) as pipe:
        plans = {p.residency: p.predicted for p in pipe.plans(REQUEST)}
        least, most = plans["streamed"].peak_bytes, plans["staged"].stages["denoise"]
        budget = pipe.hardware.context_bytes + int((least + share * (most - least)) / 0.96)
    # Of the same machine: looked at again, this process may have grown, which is of the budget.
    wishes = dataclasses.replace(pipe.wishes, budget=budget, residency="streamed")
    with tightfit.Pipeline(pipe.spec, pipe.hardware, wishes) as pipe:
        plan = next(p for p in pipe.plans(REQUEST) if p.placements["unet"].kept_bytes)
        pipe._planned = pipe._planned[0], [plan]
        result = pipe.generate(REQUEST)
    assert not result.notices
    assert result.plan.placements["unet"].kept_bytes
    assert psnr(result.images[0], whole["sdxl"]) > 75
    assert result.stages["denoise"].peak_bytes == plan.predicted.stages["denoise"]


def test_budgets_are_held(tiny_models, whole):
    """From what the slowest needs to what the fastest wants."""
    spec = str(tiny_models["sdxl"])
    with tightfit.load(spec, precision="fp32", device="cpu", requests=1) as pipe:
        plans = pipe.plans(REQUEST)
    context = plans[0].predicted.context_bytes
    needs = sorted({p.predicted.peak_bytes for p in plans})
    for needed in needs[:: len(needs) // 3]:
        wishes = Wishes(precision="fp32", requests=1, budget=context + needed)
        with tightfit.Pipeline(pipe.spec, pipe.hardware, wishes) as other:
            result = other.generate(REQUEST)
        assert result.peak_bytes <= needed
        assert psnr(result.images[0], whole["sdxl"]) > 75
    with pytest.raises(TightfitError, match="does not fit"):
        tightfit.Pipeline(
            pipe.spec, pipe.hardware, Wishes(precision="fp32", budget=context + needs[0] - 1)
        ).generate(REQUEST)


def test_a_budget_as_text(sd1, monkeypatch):
    monkeypatch.setattr(detect, "resident", lambda: 2**28)  # other tests have let this process grow
    with tightfit.load(str(sd1), device="cpu", budget="2 GiB") as pipe:
        assert pipe.plans(REQUEST)[0].budget_bytes == 2 * 2**30
    with pytest.raises(TightfitError, match="amount such as 4GiB"):
        tightfit.load(str(sd1), device="cpu", budget="much")
    with pytest.raises(TightfitError, match="unknown option 'vrm'"):
        tightfit.load(str(sd1), device="cpu", vrm="2GiB")


def test_a_process_over_its_budget_is_said(sd1, monkeypatch):
    monkeypatch.setattr(ProcessPeak, "bytes", lambda _: 10**15)
    with tightfit.load(str(sd1), device="cpu") as pipe:
        assert any("the process held" in notice for notice in pipe.generate(REQUEST).notices)


def test_previews_without_room_for_more(sd1, whole):
    """They are there all the same, and the run keeps its plan."""
    with tightfit.load(str(sd1), precision="fp32", device="cpu") as pipe:
        least = min(pipe.plans(REQUEST), key=lambda p: p.predicted.peak_bytes)
        pipe._planned = (
            pipe._planned[0],
            [
                dataclasses.replace(
                    least, budget_bytes=least.predicted.context_bytes + least.predicted.peak_bytes
                )
            ],
        )
        events = list(pipe.run(REQUEST, preview_every=1))
    result = events[-1].result
    assert result.plan.placements == least.placements
    assert all(event.preview for event in events if event.stage == "denoise")
    assert result.notices == ()
    assert psnr(result.images[0], whole["sd1"]) > 75


def test_every_run_is_measured_alike(tiny_models):
    """What one session took is never taken for another's, whose place in memory it may have had."""
    with tightfit.load(str(tiny_models["sdxl"]), precision="fp32", device="cpu", residency="staged") as pipe:
        peaks = {tuple(s.peak_bytes for s in pipe.generate(REQUEST).stages.values()) for _ in range(6)}
    assert len(peaks) == 1


ROOM = 160 * MIB  # beside the context
CARDS = {
    (7, 5): Hardware(
        "cuda",
        "sm_75",
        4 * GIB,
        4 * GIB,
        ("fp16", "fp32"),
        (7, 5),
        context_bytes=274 * MIB,
        workspaces=(8_519_680,),
    ),
    (9, 0): Hardware(
        "cuda",
        "sm_90",
        80 * GIB,
        80 * GIB,
        ("fp16", "fp32"),
        (9, 0),
        context_bytes=500 * MIB,
        workspaces=(32 * MIB,),
    ),
}


def tight(model, card: Hardware, residency: str) -> tightfit.Pipeline:
    """What test_cuda_budgets_are_held paints with."""
    wishes = Wishes(precision="fp32", residency=residency, requests=1, budget=card.context_bytes + ROOM)
    return tightfit.Pipeline(inspect(str(model)), card, wishes)


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("capability", CARDS)
def test_cuda_budgets_can_be_held(tiny_models, capability, residency):
    """By the prediction, on a card of each size of cuBLAS's workspace: which is among what is predicted."""
    card = CARDS[capability]
    best = tight(tiny_models["sd1"], card, residency).plans(REQUEST)[0]
    bare = tight(tiny_models["sd1"], dataclasses.replace(card, workspaces=()), residency).plans(REQUEST)[0]
    assert best.fits
    assert best.placements["unet"].residency == residency
    more = best.predicted.peak_bytes - bare.predicted.peak_bytes
    # A segment for less than 10 MiB takes 20.
    assert card.workspaces[0] - 20 * MIB <= more <= card.workspaces[0] + 20 * MIB


@pytest.mark.gpu
def test_cuda_budgets_are_held(tiny_models, whole):
    import torch

    card = Hardware.detect("cuda")
    for residency in RESIDENCIES:
        with tight(tiny_models["sd1"], card, residency) as pipe:
            result = pipe.generate(REQUEST)
        predicted = result.plan.predicted.peak_bytes
        assert result.peak_bytes <= ROOM
        # A segment of torch's allocator.
        assert abs(result.peak_bytes - predicted) <= 0.05 * predicted + 20 * MIB, residency
        assert psnr(result.images[0], whole["sd1"]) > 50
    assert torch.cuda.memory_reserved() < 64 * MIB
