"""Request: resolved to something total, or refused with the cure."""

from __future__ import annotations

import dataclasses

import pytest
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.fields import described, kinds
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.planner.wishes import Wishes
from tightfit.runtime.request import Request


@pytest.fixture
def spec(sd1):
    return inspect(sd1)


# None is an answer: nothing asked, so as the scheduler, the model or the plan has it.
AS_THEY_ARE = {
    "negative_prompt", "eta", "zero_snr", "subseed", "seed_resize", "hires", "hires_size", "hires_prompt",
    "hires_scheduler", "refiner", "step_cache", "skip_guidance_layers",
}  # fmt: skip


def test_resolves_to_total(tiny_models):
    for family, guidance, scheduler in (("sd1", 7.5, "own"), ("sd2", 7.5, "ddim"), ("sdxl", 5.0, "euler")):
        whole = Request("a heart").resolve(inspect(tiny_models[family]))
        assert (
            None not in {n: v for n, v in dataclasses.asdict(whole).items() if n not in AS_THEY_ARE}.values()
        )
        assert (whole.guidance_scale, whole.scheduler, whole.width, whole.height) == (
            guidance,
            scheduler,
            64,
            64,
        )
        assert whole.resolve(inspect(tiny_models[family])) == whole


def test_numbers_of_numpy(spec):
    import numpy as np

    whole = Request("a", width=np.int64(64), seed=np.uint32(7), guidance_scale=np.float32(2)).resolve(spec)
    assert (whole.width, whole.seed, whole.guidance_scale) == (64, 7, 2.0)
    assert type(whole.seed) is int


def test_random_seeds_differ(spec):
    import numpy as np

    for seed in (None, -1, np.int64(-1)):  # the second as A1111 has it
        drawn = {Request("a", seed=seed).resolve(spec).seed for _ in range(8)}
        assert len(drawn) > 1
        assert min(each for each in drawn if each is not None) >= 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": None}, ["no prompt was given", '"a red heart"']),
        ({"prompt_syntax": "a111"}, ["unknown prompt_syntax", "did you mean a1111", "plain"]),
        ({"emphasis": "loud"}, ["unknown emphasis", "original, no-norm, ignore"]),
        ({"prompt": 3}, ["prompt must be text"]),
        ({"width": 70}, ["width 70", "multiple of 8", "64 or 72"]),
        ({"height": 5}, ["height 5", "nearest are 8"]),
        ({"width": 0}, ["from 1"]),
        ({"width": True}, ["from 1"]),
        ({"num_inference_steps": 0}, ["num_inference_steps"]),
        ({"num_inference_steps": 2.5}, ["whole number"]),
        ({"num_images": -1}, ["num_images"]),
        ({"seed": -2}, ["seed", "leave it out", "-1"]),
        ({"seed": -1.0}, ["seed"]),
        ({"seed": "7"}, ["seed"]),
        ({"guidance_scale": float("nan")}, ["guidance_scale"]),
        ({"guidance_scale": -1}, ["guidance_scale"]),
        ({"guidance_scale": 10**400}, ["guidance_scale"]),
        ({"guidance_scale": "7"}, ["guidance_scale"]),
        ({"prompt": "a \udcff b"}, ["prompt", "UTF-8"]),
        ({"negative_prompt": 3}, ["negative_prompt must be text"]),
        ({"seed": 2**63 - 1, "num_images": 2}, ["leaves no seeds"]),
        ({"scheduler": "eulr"}, ["did you mean euler", "unipc"]),
        ({"scheduler": "zzz"}, ["choose euler, euler_a, ddim"]),
    ],
)
def test_bad_requests(spec, changes, words):
    with pytest.raises(TightfitError) as caught:
        dataclasses.replace(Request("a heart"), **changes).resolve(spec)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_models_own_defaults(sd1_copy):
    (sd1_copy / "tightfit.json").write_text('{"version": 1, "defaults": {"guidance_scale": 3.0}}')
    assert Request("a").resolve(inspect(sd1_copy)).guidance_scale == 3.0
    assert Request("a", guidance_scale=4.0).resolve(inspect(sd1_copy)).guidance_scale == 4.0


@pytest.mark.parametrize("name", [name for name, known in described(Request).items() if known.bounds])
def test_bounds_are_those_that_the_field_says(name):
    least, most = described(Request)[name].bounds or (0, 0)
    kind = kinds(Request)[name]
    for value in (least, most):
        assert getattr(dataclasses.replace(Request("a"), **{name: kind(value)}).checked(), name) == value
    below = least - 2 if name in ("seed", "subseed") else least - 1  # -1 is a random one
    for value in (below, most + 1):
        with pytest.raises(TightfitError, match=f"{name} must be a .*number from {least} to {most}, not"):
            dataclasses.replace(Request("a"), **{name: kind(value)}).checked()


@pytest.mark.parametrize("name", [name for name, kind in kinds(Request).items() if kind is str])
def test_text_is_text(name):
    with pytest.raises(TightfitError, match=f"{name} must be text, not int"):
        dataclasses.replace(Request("a"), **{name: 3}).checked()


@pytest.mark.parametrize("name", [name for name, known in described(Wishes).items() if known.choices])
def test_wishes_know_the_words_that_the_field_says(name):
    words = described(Wishes)[name].choices
    for word in ("auto", *words):
        assert getattr(Wishes(**{name: word}), name) == word
    with pytest.raises(TightfitError, match=f"unknown {name} 'x': choose auto, {', '.join(words)}"):
        Wishes(**{name: "x"})


def test_kinds_leave_none_out():
    assert kinds(Request)["width"] is kinds(Request)["num_images"] is int
    assert kinds(Wishes)["budget"] is str
