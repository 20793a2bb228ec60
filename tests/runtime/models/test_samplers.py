"""Samplers and schedules by name: each against diffusers' own scheduler, or the formulas in fp64; what cannot
go together is one line."""

from __future__ import annotations

import dataclasses

import pytest
import tightfit
import torch
from tightfit import Request
from tightfit.benchmarks import samplers as table
from tightfit.benchmarks.sampler_references import FORMULAS
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models import schedulers
from tightfit.runtime.models.samplers.names import (
    AUTOMATIC,
    OWN,
    SAMPLERS,
    SCHEDULES,
    a1111_fields,
    joined,
    of_a1111,
    split,
)
from tightfit.runtime.models.schedulers import Tuning

EVERY = [
    (sampler, schedule) for sampler in SAMPLERS.values() if sampler.name != OWN for schedule in SCHEDULES
]


@pytest.fixture(scope="module")
def spec(tiny_models):
    return tightfit.inspect(str(tiny_models["sd1"]))


SLOW = {"dpm2", "dpm2_a"}  # diffusers' set_timesteps takes half a second
FEW = (AUTOMATIC, "karras", "simple")


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != OWN])
def test_latents_are_those_of_diffusers_or_of_the_formulas(spec, sampler):
    """Every schedule for v, and every kind of prediction by the sampler's own; of slow ones a few for v."""
    for case in (case for case in table.cases() if case.of == sampler and not case.lacks):
        few, is_v = case.schedule in FEW, case.prediction == "v"
        if not (few and is_v if sampler in SLOW else case.schedule == AUTOMATIC or is_v):
            continue
        decibels = table.decibels(case, spec)
        least = float("inf") if case.reference == table.DIFFUSERS else 75
        assert decibels >= least, (case, decibels)


def test_another_sampler_or_schedule_is_another_picture(spec):
    """So that the test above can fail."""
    case = table.Case("heun", "karras", "v")
    other = dataclasses.replace(case, schedule="simple")
    config = {"_class_name": "DDIMScheduler", **table.BETAS, **table.PREDICTIONS["v"]}
    model = dataclasses.replace(spec, scheduler=config)
    made = schedulers.make(case.name, model, table.STEPS)
    exact = table.by_formula(case, made, model)
    for wrong in (other, dataclasses.replace(case, of="dpmpp_2m")):
        latents = table.run(schedulers.make(wrong.name, model, table.STEPS)).numpy()
        assert 0 < abs(latents - exact).max() / abs(exact).max() > 1e-4


@pytest.mark.parametrize(("sampler", "kind"), [
    ("euler_a", "EulerAncestralDiscreteScheduler"), ("dpm2_a", "KDPM2AncestralDiscreteScheduler"),
    ("dpmpp_2m_sde", "DPMSolverMultistepScheduler"), ("dpmpp_2m_sde_heun", "DPMSolverMultistepScheduler"),
])  # fmt: skip
def test_ours_with_eta_one_is_diffusers_own(spec, sampler, kind):
    """Up to the rounding of timesteps by some of diffusers' classes."""
    config = {"_class_name": "DDIMScheduler", **table.BETAS, "timestep_spacing": "trailing"}
    model = dataclasses.replace(spec, scheduler=config)
    theirs = schedulers.make(sampler, model, table.STEPS)
    assert type(theirs).__name__ == kind
    ours = schedulers.make(sampler, model, table.STEPS, tuning=Tuning(eta=1.0))
    assert type(ours).__name__ == "Stochastic"
    assert abs(theirs.timesteps - ours.timesteps).max() < 0.01
    exact = table.run(theirs)
    if kind == "DPMSolverMultistepScheduler":  # its latents are smaller throughout, and begin at 1 exactly
        ours = table.run(ours, float((ours.sigmas[0] ** 2 + 1) ** 0.5))
    else:
        ours = table.run(ours)
    assert abs(ours - exact).max() < 1e-4 * abs(exact).max()


def test_eta_and_s_noise(spec):
    """Without noise an ancestral sampler is its plain one; the strength of noise is a factor of it."""
    config = {"_class_name": "DDIMScheduler", **table.BETAS}
    model = dataclasses.replace(spec, scheduler=config)

    def latents(name, **tuning):
        return table.run(schedulers.make(name, model, table.STEPS, tuning=Tuning(**tuning)))

    for name, plain in (("euler_a_karras", "euler_karras"), ("dpm2_a_uniform", "dpm2_uniform")):
        exact = latents(plain)
        assert abs(latents(name, eta=0.0) - exact).max() < 2e-4 * abs(exact).max()
        # Noise that is taken out and not put back leaves less.
        assert latents(name, s_noise=0.0).std() < latents(name, s_noise=1.0).std()
        assert not torch.equal(latents(name, eta=0.5), latents(name, eta=0.6))
    churned = schedulers.step_options(
        schedulers.make("euler", model, 5), None, Tuning(s_churn=10.0, s_noise=1.1)
    )
    assert (churned["s_churn"], churned["s_noise"]) == (10.0, 1.1)
    assert schedulers.step_options(schedulers.make("ddim", model, 5), None, Tuning(eta=0.3))["eta"] == 0.3


def test_zero_snr_begins_with_noise_alone(spec):
    """In classes of diffusers that have it, and in those that do not. Every other option stays."""
    model = dataclasses.replace(
        spec,
        scheduler={"_class_name": "DDIMScheduler", **table.BETAS, "prediction_type": "v_prediction"},
    )
    for name in ("euler", "heun", "dpmpp_2m_karras", "dpm2", "dpmpp_2s_a_simple"):
        plain, rescaled = (
            schedulers.make(name, model, 10, tuning=Tuning(zero_snr=on)) for on in (None, True)
        )
        assert plain.sigmas[0] < 15
        assert rescaled.sigmas[0] == pytest.approx(4096, rel=1e-3)
        assert float(rescaled.timesteps[0]) == 999
    told = dataclasses.replace(
        model, scheduler={**model.scheduler, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    )
    assert schedulers.make("heun", told, 10).sigmas[0] == pytest.approx(4096, rel=1e-3)
    assert schedulers.make("heun", told, 10, tuning=Tuning(zero_snr=False)).sigmas[0] < 15


@pytest.mark.parametrize(("spelling", "name"), [
    ("DPM++ 2M SDE Karras", "dpmpp_2m_sde_karras"),
    ("dpm++ 2m sde heun exponential", "dpmpp_2m_sde_heun_exponential"),
    ("Euler a", "euler_a"), ("EULER-A", "euler_a"), ("euler ancestral", "euler_a"), ("k_euler_a", None),
    ("DPM++ 2S a Karras", "dpmpp_2s_a_karras"), ("DPM2 a", "dpm2_a"), ("KDPM2DiscreteScheduler", "dpm2"),
    ("EulerAncestralDiscreteScheduler", "euler_a"), ("DPMSolverMultistepScheduler", "dpmpp_2m"),
    ("HeunDiscrete", "heun"), ("PLMS", "pndm"), ("UniPC SGM Uniform", "unipc_sgm_uniform"), ("ddim", "ddim"),
    ("dpmpp_3m_sde", "dpmpp_3m_sde"), ("LMS Karras", "lms_karras"),
    ("Euler Align Your Steps", "euler_align_your_steps"),
    ("euler ays", "euler_align_your_steps"), ("TCD", "tcd"), ("own", "own"), ("dpm++2m", "dpmpp_2m"),
])  # fmt: skip
def test_names_as_people_spell_them(spelling, name):
    if name is None:
        with pytest.raises(TightfitError, match="unknown scheduler"):
            split(spelling)
    else:
        assert joined(*split(spelling)) == name


def test_every_name_is_read_back():
    for sampler, schedule in EVERY:
        name = joined(sampler, schedule)
        assert split(name) == (sampler, schedule)
        fields = a1111_fields(name)
        if schedule != AUTOMATIC:
            assert of_a1111(fields["Sampler"], fields["Schedule type"]) == name
            assert of_a1111(sampler.a1111, SCHEDULES[schedule].a1111) == name
    assert of_a1111("DPM++ 2M", "Automatic") == "dpmpp_2m_karras"
    assert of_a1111("DPM++ 3M SDE", "Automatic") == "dpmpp_3m_sde_exponential"
    assert of_a1111("Restart", "Karras") == "Restart Karras"


@pytest.mark.parametrize(("options", "words"), [
    ({"scheduler": "ddim", "schedule": "karras"}, ["ddim takes no schedule karras", "choose --schedule"]),
    ({"scheduler": "PLMS Beta"}, ["pndm takes no schedule beta", "--schedule uniform"]),
    ({"scheduler": "lcm", "schedule": "simple"}, ["lcm takes no schedule simple", "--schedule automatic"]),
    ({"schedule": "karas"}, ["unknown schedule 'karas'", "did you mean karras"]),
    ({"scheduler": "heun", "eta": 0.5}, ["heun has no eta", "euler_a", "ddim"]),
    ({"scheduler": "ddim", "s_churn": 5}, ["ddim has no s_churn", "choose euler"]),
    ({"scheduler": "euler", "s_noise": 1.1}, ["--s-churn"]),
    ({"scheduler": "euler_a", "eta": float("nan")}, ["eta must be a number from 0 to 1"]),
    ({"scheduler": "euler_a", "eta": 1.5}, ["eta must be a number from 0 to 1"]),
    ({"s_churn": "x"}, ["s_churn must be a number"]),
    ({"zero_snr": 1}, ["zero_snr must be true or false"]),
])  # fmt: skip
def test_what_does_not_go_together_is_one_line(spec, options, words):
    with pytest.raises(TightfitError) as caught:
        Request("a", **options).resolve(spec)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_schedule_joins_the_schedulers_name(spec):
    def decided(**options):
        job = Request("a", **options).resolve(spec)
        return job.scheduler, job.schedule

    assert decided(scheduler="DPM++ 2M Karras") == ("dpmpp_2m_karras", AUTOMATIC)
    assert decided(scheduler="DPM++ 2M Karras", schedule="SGM Uniform") == ("dpmpp_2m_sgm_uniform", AUTOMATIC)
    assert decided(scheduler="euler", schedule="beta") == ("euler_beta", AUTOMATIC)
    job = Request("a", scheduler="heun", schedule="karras").resolve(spec)
    assert job.request.resolve(spec) == job


def test_calls_are_as_many_as_timesteps(spec):
    for sampler, schedule in EVERY:
        if schedule not in {*sampler.schedules} & {*FEW} or table.Case(sampler.name, schedule, "v").lacks:
            continue
        name = joined(sampler, schedule)
        for tuning in (Tuning(), *([Tuning(eta=0.5)] if sampler.ours else [])):
            made = schedulers.make(name, spec, 5, tuning=tuning)
            assert schedulers.calls(name, spec, 5) == len(made.timesteps), name
            assert len(schedulers.ends(made, 5)) == 5, name


def test_every_name_has_a_row_in_the_docs():
    text = table.DOCS.read_text("utf-8")
    for sampler in SAMPLERS.values():
        assert f"`{sampler.name}`" in text, sampler.name
    for schedule in SCHEDULES:
        assert f"`{schedule}`" in text, schedule
    assert {*FORMULAS} < {*SAMPLERS}
