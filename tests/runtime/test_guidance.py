"""Guidance: rescaled, and in some of the steps only, which saves time that the plan counts."""

from __future__ import annotations

import dataclasses

import pytest
import tightfit
import torch
from tightfit import Request
from tightfit.benchmarks.metrics import psnr
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.models import schedulers
from tightfit.runtime.planner import choose as planner
from tightfit.runtime.run import Run

OPTIONS = {"num_inference_steps": 6, "guidance_scale": 6.0, "negative_prompt": "blue"}


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def pair(request, tiny_models):
    """diffusers' pipeline and ours, of one model."""
    import diffusers

    theirs = diffusers.DiffusionPipeline.from_pretrained(tiny_models[request.param], dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    with tightfit.load(
        str(tiny_models[request.param]), precision="fp32", device="cpu", cfg="batched"
    ) as ours:
        yield theirs, ours


def their_picture(pipeline, **options):
    generator = torch.Generator("cpu").manual_seed(7)
    return pipeline("a red heart", generator=generator, **OPTIONS, **options).images[0]


def rows_of(monkeypatch) -> list[int]:
    """Filled with the rows of each call of the denoiser."""
    rows, session = [], Run._session

    def recorded(self, name):
        real = session(self, name)

        def call(**arrays):
            if "timestep" in arrays:
                rows.append(len(arrays["sample"]))
            return real(**arrays)

        return call

    monkeypatch.setattr(Run, "_session", recorded)
    return rows


def test_rescaled_guidance_is_diffusers(pair):
    theirs, ours = pair
    plain, exact = their_picture(theirs), their_picture(theirs, guidance_rescale=0.7)
    picture = ours("a red heart", seed=7, guidance_rescale=0.7, **OPTIONS)
    assert psnr(picture, exact) > 75
    assert psnr(picture, plain) < 70


def test_guidance_that_ends_is_diffusers_with_its_callback(pair, monkeypatch):
    """Its documentation cuts guidance off so; XL's has two inputs more to halve."""
    theirs, ours = pair
    halved = [name for name in ("prompt_embeds", "add_text_embeds", "add_time_ids") if name in
              ("prompt_embeds", *getattr(theirs, "_callback_tensor_inputs", ()))]  # fmt: skip

    # diffusers counts calls: PNDM's second step takes two.
    _, guided = ours._job(Request("a", guidance_end=0.5, **OPTIONS)).calls_with("unet")

    def cut(pipe, step, timestep, tensors):
        if step == guided - 1:
            pipe._guidance_scale = 0.0
            tensors.update({name: tensors[name][-1:] for name in halved})
        return tensors

    exact = their_picture(theirs, callback_on_step_end=cut, callback_on_step_end_tensor_inputs=halved)
    rows = rows_of(monkeypatch)
    picture = ours("a red heart", seed=7, guidance_end=0.5, **OPTIONS)
    assert rows == [2] * guided + [1] * (len(rows) - guided)
    assert psnr(picture, exact) > 75
    assert psnr(picture, their_picture(theirs)) < 70


@pytest.mark.parametrize("cfg", ["batched", "sequential"])
@pytest.mark.parametrize(("scheduler", "rows"), [
    ("euler", [1, 2, 2, 1]), ("heun", [1, 1, 2, 2, 2, 2, 1]), ("pndm", [1, 1, 2, 2, 1]),
])  # fmt: skip
def test_calls_outside_have_one_row(sd1, monkeypatch, cfg, scheduler, rows):
    asked = Request("a", num_inference_steps=4, guidance_start=0.25, guidance_end=0.75, scheduler=scheduler)
    found = rows_of(monkeypatch)
    with tightfit.load(str(sd1), precision="fp32", device="cpu", cfg=cfg, residency="staged") as pipe:
        result = pipe.generate(asked)
        job = pipe._job(asked)
    expected = rows if cfg == "batched" else [1 for row in rows for _ in range(row)]
    assert found == expected
    assert (job.calls, job.calls_with("unet")) == (len(rows), (len(rows), rows.count(2)))
    measured, predicted = result.stages["denoise"].peak_bytes, result.plan.predicted.stages["denoise"]
    assert abs(measured - predicted) <= 0.05 * predicted


def test_seconds_and_bytes_of_the_plan(sd1):
    """One-row calls are as long as without guidance; the peak is that of the guided steps."""
    spec, machine = tightfit.inspect(str(sd1)), Hardware.detect("cpu")

    def predicted(**options):
        plans = planner.plan(machine, spec, Request("a", scheduler="euler", **options))
        return {plan.summary(): plan.predicted for plan in plans}

    whole, half = (predicted(num_inference_steps=200, guidance_end=end) for end in (1.0, 0.5))
    single = [predicted(num_inference_steps=steps, guidance_scale=1.0) for steps in (100, 200)]
    shorter = [predicted(num_inference_steps=100)]
    for way, cost in half.items():
        assert cost.peak_bytes == whole[way].peak_bytes
        guided = whole[way].seconds - shorter[0][way].seconds  # of 100 steps
        if way in single[0]:
            alone = single[1][way].seconds - single[0][way].seconds
            assert cost.seconds == pytest.approx(shorter[0][way].seconds + alone, rel=1e-6)
        assert shorter[0][way].seconds < cost.seconds < shorter[0][way].seconds + guided


def test_another_interval_is_planned_anew(sd1):
    with tightfit.load(str(sd1), device="cpu") as pipe:
        long, short = (pipe.plans(Request("a", guidance_end=end))[0] for end in (1.0, 0.2))
    assert short.predicted.seconds < long.predicted.seconds


def test_steps_have_all_calls(sd1):
    spec = tightfit.inspect(str(sd1))
    for name in ("euler", "heun", "dpmpp_2s_a", "pndm", "own", "dpmpp_2m_karras"):
        for steps in (1, 2, 5, 20):
            counts = schedulers.calls_by_step(name, spec, steps)
            assert sum(counts) == schedulers.calls(name, spec, steps)
            assert len(counts) == steps
            assert min(counts) >= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"guidance_start": 0.6, "guidance_end": 0.4},
            ["guidance_start 0.6 must be below", "--guidance-scale 1"],
        ),
        ({"guidance_rescale": 0.5, "guidance_scale": 1.0}, ["guidance_rescale changes nothing", "above 1"]),
        ({"guidance_end": 0.5, "guidance_scale": 0.0}, ["guidance_end changes nothing"]),
        ({"guidance_start": float("nan")}, ["guidance_start must be a number from 0 to 1"]),
        ({"skip_guidance_layers": "1"}, ["is not guided by its layers: leave --skip-layers out"]),
        ({"guidance_rescale": 2}, ["guidance_rescale must be a number from 0 to 1"]),
    ],
)
def test_guidance_that_cannot_be(sd1, options, words):
    with pytest.raises(TightfitError) as caught:
        Request("a", **options).resolve(tightfit.inspect(str(sd1)))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_was_before_is_not_written_or_changed(sd1):
    """A request without these is written as before, and its job asks for nothing more."""
    spec = tightfit.inspect(str(sd1))
    job = Request("a", seed=3).resolve(spec)
    assert (
        not {"guidance_rescale", "guidance_start", "noise_source", "schedule", "eta"} & job.to_json().keys()
    )
    assert dataclasses.replace(job.request).resolve(spec) == job
    assert job.calls_with(spec.denoiser.name) == (job.calls, job.calls)
