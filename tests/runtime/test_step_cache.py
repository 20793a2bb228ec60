"""Steps that are cached: a shallow call is diffusers' U-Net around what a full one has kept, in the memory
that was predicted; left off, nothing changes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tightfit
import torch
from tightfit.runtime import infotext
from tightfit.runtime.asking import request_of
from tightfit.runtime.backends.torch.backend import TorchSession
from tightfit.runtime.cli import plan as cli_plan
from tightfit.runtime.errors import OutOfMemoryError, TightfitError
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.machine.profiles import profile
from tightfit.runtime.models.families import step_cache
from tightfit.runtime.models.families.controlnet import _answer
from tightfit.runtime.models.families.family import KEPT, Extent
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.passes import passes, wishes_after
from tightfit.runtime.pipeline import Pipeline
from tightfit.runtime.placement import Placement
from tightfit.runtime.planner.choose import plan as plans_of
from tightfit.runtime.planner.plan import Plan
from tightfit.runtime.planner.wishes import Wishes
from tightfit.runtime.request import Request, together

ONE_WAY: dict[str, Any] = {"precision": "fp32", "attention": "sdpa", "tiling": "whole"}
SIZE: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 5, "seed": 1, "scheduler": "ddim"}
CACHED = Request("a red heart", step_cache=3, **SIZE)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """How the U-Net is called: whole, full or shallow."""
    found, call = [], TorchSession.__call__

    def noted(self, **arrays):
        if "sample" in arrays and "picture" not in arrays:
            found.append("shallow" if KEPT in arrays else "full" if arrays.get("caching") else "whole")
        return call(self, **arrays)

    monkeypatch.setattr(TorchSession, "__call__", noted)
    return found


def pixels(result) -> list[np.ndarray]:
    return [np.asarray(image, int) for image in result.images]


class Replaced:
    """diffusers' U-Net, in which the maps before the last layer are noted, or others take their place."""

    def __init__(self, unet: Any) -> None:
        self.unet, self.width = unet, unet.config.block_out_channels[0]
        self.maps: torch.Tensor | None = None
        unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(self._joined)

    def _joined(self, _: Any, given: tuple[torch.Tensor, ...]) -> Any:
        joined, *others = given
        if self.maps is None:
            self.maps = joined[:, : self.width].clone()
        return torch.cat([self.maps, joined[:, self.width :]], 1), *others


def inputs(spec: tightfit.ModelSpec, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = spec.inputs(spec.denoiser, 2, 64, 96)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | {
        "timestep": torch.tensor(900.0 - seed)
    }


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@torch.inference_mode()
def test_a_shallow_call_is_diffusers_around_what_was_kept(deep_models, family):
    from diffusers import UNet2DConditionModel

    spec = tightfit.inspect(str(deep_models[family]))
    ours, theirs = (UNet2DConditionModel.from_pretrained(deep_models[family] / "unet") for _ in range(2))
    reference, call = Replaced(theirs), spec.denoiser.network.call_cached
    assert call
    for added in (0, 10):  # with what a ControlNet adds
        first, second = ({**inputs(spec, seed), **residuals(spec, seed, added)} for seed in (1, 2))
        reference.maps = None
        expected, exact = (spec.denoiser.network.call(theirs, **given)[0] for given in (first, second))
        whole, kept = call(ours, **first)
        assert torch.equal(whole, expected)
        near = {name: value for name, value in second.items() if name != "residual_1"}
        (shallow,) = call(ours, kept=kept, **near)
        assert torch.equal(shallow, exact)
        (other,) = call(ours, kept=kept + 1, **near)
        assert not torch.equal(other, exact)
        assert torch.equal(spec.denoiser.network.call(ours, **first)[0], expected)


def residuals(spec: tightfit.ModelSpec, seed: int, scale: float) -> dict[str, torch.Tensor]:
    from tightfit.runtime.models.families.networks import residuals as shapes

    generator = torch.Generator().manual_seed(10 * seed)
    if not scale:
        return {}
    every = shapes(spec, Extent(2, 64, 96)).items()
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in every}


@torch.inference_mode()
def test_a_controlnet_answers_a_shallow_call_what_it_reads(deep_models, tmp_path):
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet: Any = UNet2DConditionModel.from_pretrained(deep_models["sd1"] / "unet")
    net: Any = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    for number, part in enumerate(net.controlnet_down_blocks):
        torch.nn.init.constant_(part.weight, 0.01 + number)
    generator = torch.Generator().manual_seed(1)
    sample, picture = (
        torch.randn(2, count, side, side, generator=generator) for count, side in ((4, 8), (3, 16))
    )
    hidden = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
    count = len(net.controlnet_down_blocks) + 1
    given = {"hidden": hidden, "picture": picture, "scales": torch.arange(2.0 * count).view(2, count) + 1}
    first, *_ = _answer(net, sample, torch.tensor(5.0), **given)
    (shallow,) = step_cache.control(_answer, net, sample, torch.tensor(5.0), **given)
    assert torch.equal(shallow, first)
    assert first.abs().max() > 0
    (after,) = step_cache.control(_answer, net, sample, torch.tensor(5.0), residual_0=first, **given)
    assert torch.equal(after, first + first)


@pytest.mark.parametrize(
    ("family", "ways", "options"),
    [
        ("sd1", {"residency": "resident"}, {}),
        ("sd1", {"residency": "streamed", "cfg": "sequential"}, {}),
        ("sd1", {"residency": "resident", "images_per_call": 2}, {"num_images": 4}),
        ("sdxl", {"residency": "staged", "cfg": "sequential", "precision": "bf16"}, {}),
        ("sd1", {"residency": "resident", "precision": "int8"}, {}),
    ],
)
def test_the_peak_is_as_predicted(tiny_models, monkeypatch, family, ways, options):
    monkeypatch.setattr("tightfit.runtime.planner.choose.WIDER", 0.0)
    with tightfit.load(str(tiny_models[family]), device="cpu", **{**ONE_WAY, **ways}) as pipe:
        for every in (1, 3):
            request = replace(CACHED, step_cache=every, **options)
            pipe.generate(request)  # in the first call of a first request the decoder is not there yet
            result = pipe.generate(request)
            assert result.plan.step_cache == every
            predicted = result.plan.predicted.stages["denoise"]
            assert result.stages["denoise"].peak_bytes == pytest.approx(predicted, rel=0.05)
    kept_bytes = result.stages["denoise"].peak_bytes
    assert kept_bytes > 0


def test_left_off_nothing_changes(sd1, calls):
    with tightfit.load(str(sd1), device="cpu", residency="resident", **ONE_WAY) as pipe:
        plain, off, cached = (pipe.generate(replace(CACHED, step_cache=n)) for n in (None, 1, 3))
    assert Counter(calls) == {"whole": 10, "full": 2, "shallow": 3}
    assert np.array_equal(pixels(plain)[0], pixels(off)[0])
    assert not np.array_equal(pixels(plain)[0], pixels(cached)[0])
    assert "cache" not in plain.images[0].info["parameters"].lower()


def test_a_picture_carries_it(sd1, tmp_path):
    with tightfit.load(str(sd1), device="cpu", residency="resident", cache_every=3, **ONE_WAY) as pipe:
        by_wish = pipe.generate(replace(CACHED, step_cache=None))
        text = by_wish.images[0].info["parameters"]
        assert "Step cache: 3" in text
        assert infotext.parse(text, "it").request["step_cache"] == 3
        assert by_wish.request.step_cache == 3
        foreign = text[: text.index(", tightfit: ")]  # as another program leaves it
        assert infotext.parse(foreign, "it").request["step_cache"] == 3
    with tightfit.load(str(sd1), device="cpu", residency="resident", **ONE_WAY) as pipe:
        again = pipe.generate(Request(**infotext.parse(text, "it").request))
        assert np.array_equal(pixels(again)[0], pixels(by_wish)[0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scheduler": "heun"}, "full full shallow shallow shallow shallow full full shallow"),
        ({"guidance_end": 0.4}, "full shallow full full shallow"),
        ({"guidance_end": 0.4, "cfg": "sequential"}, "full full shallow shallow full full shallow"),
        ({"num_images": 2}, "full shallow shallow full shallow " * 2),
        ({"hires": 1.5, "hires_steps": 2}, "full shallow shallow full shallow whole whole"),
    ],
)
def test_which_steps_are_full(sd1, calls, options, expected):
    ways = {name: options[name] for name in options if name == "cfg"}
    asked = {name: options[name] for name in options if name != "cfg"}
    with tightfit.load(str(sd1), device="cpu", residency="resident", **ONE_WAY, **ways) as pipe:
        request = replace(CACHED, **asked)
        result = pipe.generate(request)
        assert calls == expected.split()
        assert "Step cache: 3" in result.images[0].info["parameters"]
        if "hires" not in asked:
            (job,) = {request.resolve(pipe.spec)}
            full = job.full_calls(3, "unet")[0] * job.num_images
            rows = 2 if ways else 1
            assert full <= calls.count("full") <= rows * full


def test_full_steps_end_with_the_last_but_one_and_few_are_even():
    """As many as counted back, and none further from the one before than that."""
    spec = tightfit.inspect("emoji")
    for steps in (3, 4, 8, 10, 25, 50):
        job = Request("a", num_inference_steps=steps, scheduler="ddim").resolve(spec)
        for every in (2, 3, 5, 10):
            full, back = sorted(job.full_steps(every)), {1, *range(steps - 1, 0, -every)}
            assert (len(full), full[0], full[-1]) == (len(back), 1, steps - 1)
            gaps = np.diff(full)
            assert gaps.max() <= every
            assert {*full} == back if len(full) > 4 else gaps.max() - gaps.min() <= 1
    assert sorted(job.full_steps(10)) == [1, 9, 19, 29, 39, 49]


def test_after_memory_ran_out_the_next_step_is_full(sd1, calls, monkeypatch):
    with tightfit.load(str(sd1), device="cpu", **ONE_WAY) as pipe:
        expected = pixels(pipe.generate(replace(CACHED, step_cache=1)))[0]
        calls.clear()
        call = TorchSession.__call__

        def failing(self, **arrays):
            if KEPT in arrays and calls.count("shallow") == 1 and "failed" not in calls:
                calls.append("failed")
                raise OutOfMemoryError("no room")
            return call(self, **arrays)

        monkeypatch.setattr(TorchSession, "__call__", failing)
        result = pipe.generate(CACHED)
    assert calls[:4] == ["full", "shallow", "failed", "full"]
    assert result.plan.step_cache == 3
    assert np.abs(pixels(result)[0] - expected).mean() < 30


@pytest.mark.parametrize(("engine", "name"), [("onnx", "ONNX Runtime"), ("openvino", "OpenVINO")])
def test_graphs_are_refused_by_name(sd1, engine, name):
    pytest.importorskip("onnxruntime" if engine == "onnx" else engine)
    from tightfit.runtime import backends

    spec, graph = tightfit.inspect(str(sd1)), object()  # which is not looked at
    unet = replace(spec.denoiser, graph=graph)
    placement = Placement(engine, "fp32", "fp32", "resident", "sdpa", "whole")
    extent = Extent(2, 64, 64, cache="full")
    why = backends.engine(engine).refuses(spec, unet, placement, Hardware.detect("cpu"), extent)
    assert why is not None
    assert why.startswith(f"{name} runs all of a graph in each step: leave out --step-cache")


def test_what_the_planner_prefers(capsys):
    spec, card = tightfit.inspect("emoji"), profile("rtx-2060")
    request = Request("a", num_inference_steps=25)
    chosen = {
        prefer: plans_of(card, spec, request, Wishes(prefer=prefer))
        for prefer in ("quality", "balanced", "speed")
    }
    assert {plan.step_cache for plan in chosen["quality"]} == {1}
    assert [plan.to_json() for plan in chosen["quality"]] == [
        plan.to_json() for plan in plans_of(card, spec, request)
    ]
    balanced, speed = (chosen[prefer][0] for prefer in ("balanced", "speed"))
    assert 1 < balanced.step_cache <= speed.step_cache
    assert speed.predicted.seconds < chosen["quality"][0].predicted.seconds
    assert speed.predicted.psnr < chosen["quality"][0].predicted.psnr
    assert "saves" in speed.reason
    assert "dB in place of" in speed.reason
    exact = plans_of(card, spec, request, Wishes(prefer="speed", min_psnr=speed.predicted.psnr + 0.1))[0]
    assert exact.step_cache < speed.step_cache
    told = plans_of(card, spec, replace(request, step_cache=2), Wishes(prefer="speed"))
    assert {plan.step_cache for plan in told} == {2}
    kinds = {plan.denoiser.arithmetic for plan in chosen["speed"] if plan.fits}
    assert {plan.denoiser.arithmetic for plan in chosen["speed"] if plan.step_cache > 1} == kinds
    cli_plan.print_choices(chosen["quality"])
    assert not capsys.readouterr().out
    cli_plan.print_choices(chosen["speed"])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("What cached steps save and cost")
    assert max(map(len, lines)) <= 110
    told = [line.split() for line in lines if "in full" in line]
    assert len(told) == 4 * len(kinds)
    fp16 = [float(cells[-1]) for cells in told if cells[0] == "fp16,"]
    assert fp16 == sorted(fp16, reverse=True)  # all in full, then 1 of 2, 3 and 5


def test_what_a_larger_pass_goes_on_from_is_known_to_lose_more():
    spec, card = tightfit.inspect("emoji"), profile("rtx-2060")
    wishes = Wishes(prefer="balanced", precision="fp16", residency="staged", attention="sdpa", tiling="whole")
    first, second = passes(Request("a", num_inference_steps=25, hires=1.5).resolve(spec))
    for prefer, caches in (("balanced", False), ("speed", True)):
        plan = plans_of(card, spec, first, replace(wishes, prefer=prefer))[0]
        assert (plan.step_cache > 1) == caches
    assert plan.predicted.psnr < 36
    after = wishes_after(first, plan, second, replace(wishes, prefer="speed"))
    assert {one.step_cache for one in plans_of(card, spec, second, after)} == {1}


@pytest.mark.parametrize(("prompt", "steps"), [("a AND b", 25), ("[a|b]", 25), ("[a:b:0.5]", 25), ("a", 4)])
def test_the_planner_caches_where_it_is_known_what_that_costs(prompt, steps):
    """Of one text, and of so few steps none is near enough to another."""
    wishes = Wishes(prefer="speed", precision="fp16", residency="staged", attention="sdpa", tiling="whole")
    request = Request(prompt, num_inference_steps=steps)
    plans = plans_of(profile("rtx-2060"), tightfit.inspect("emoji"), request, wishes)
    assert {plan.step_cache for plan in plans} == {1}


def test_plans_of_one_text_are_no_others():
    """Two pictures of a text each take as many calls as two of one text that changes: the pipeline keeps
    plans of jobs that are alike."""
    with tightfit.load("emoji", device="cpu", prefer="speed", images_per_call=2, **ONE_WAY) as pipe:
        caches = []
        for prompts in (("a", "b"), ("[a|b|c]", "[a|b|c]")):
            asked = [Request(prompt, seed=n, num_inference_steps=25) for n, prompt in enumerate(prompts)]
            job = together([request.resolve(pipe.spec) for request in asked])
            caches.append(pipe.planned(job)[-1].plans[0].step_cache)
    assert caches[0] > 1 == caches[1]


def test_a_saved_plan_has_it(sd1):
    with tightfit.load(str(sd1), device="cpu", residency="resident", **ONE_WAY) as pipe:
        plan = pipe.plans(CACHED)[0]
    read = Plan.from_json(json.dumps(plan.to_json()))
    assert read == plan
    with tightfit.load(str(sd1), device="cpu", plan=read) as pipe:
        assert pipe.plans(replace(CACHED, step_cache=None))[0].step_cache == 3
        assert pipe.plans(replace(CACHED, step_cache=2))[0].step_cache == 2
    old = {name: value for name, value in plan.to_json().items() if name != "step_cache"}
    assert Plan.from_json(json.dumps(old)).step_cache == 1
    with pytest.raises(TightfitError, match="1 step of 99"):
        Plan.from_json(json.dumps({**old, "step_cache": 99}))


@pytest.mark.parametrize("every", [0, 11, 2.5, True, "3"])
def test_what_it_cannot_be(every):
    with pytest.raises(TightfitError, match="step_cache must be a whole number from 1 to 10"):
        request_of({"prompt": "a", "step_cache": every}).checked()
    if every in (0, 11):
        with pytest.raises(TightfitError, match="cache_every must be a whole number from 1 to 10"):
            Wishes(cache_every=every)


def test_a_picture_that_is_enlarged_has_a_plan_of_its_own():
    """Of the same size and calls as one that is not."""
    plain = Request("a", width=64, height=64, num_inference_steps=25)
    larger = replace(plain, hires=2.0, hires_upscaler="lanczos")
    wishes = Wishes(prefer="balanced", residency="staged", cfg="batched", **ONE_WAY)
    with Pipeline(inspect("emoji"), Hardware.detect("cpu"), wishes) as pipeline:
        plans = pipeline.plan(plain), pipeline.plan(larger)
    assert [plan.step_cache > 1 for plan in plans] == [True, False]
