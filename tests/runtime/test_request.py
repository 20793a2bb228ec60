"""Request: resolved to something total, or refused with the cure."""

from __future__ import annotations

import dataclasses

import pytest
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.request import Request
from tightfit.runtime.spec import inspect


@pytest.fixture
def spec(sd1):
    return inspect(sd1)


def test_resolves_to_total(tiny_models):
    for family, guidance, scheduler in (("sd1", 7.5, "dpmpp_2m_karras"), ("sd2", 7.5, "ddim"), ("sdxl", 5.0, "euler")):
        whole = Request("a heart").resolve(inspect(tiny_models[family]))
        assert None not in dataclasses.asdict(whole).values()
        assert (whole.guidance_scale, whole.scheduler, whole.width, whole.height) == (guidance, scheduler, 64, 64)
        assert whole.resolve(inspect(tiny_models[family])) == whole


def test_random_seeds_differ(spec):
    assert len({Request("a").resolve(spec).seed for _ in range(8)}) > 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "  \n"}, ["prompt is empty"]),
        ({"prompt": 3}, ["prompt must be text"]),
        ({"width": 70}, ["width 70", "multiple of 8", "64 or 72"]),
        ({"height": 5}, ["height 5", "nearest are 8"]),
        ({"width": 0}, ["from 1"]),
        ({"width": True}, ["from 1"]),
        ({"num_inference_steps": 0}, ["num_inference_steps"]),
        ({"num_inference_steps": 2.5}, ["whole number"]),
        ({"num_images": -1}, ["num_images"]),
        ({"seed": -1}, ["seed", "leave it out"]),
        ({"seed": "7"}, ["seed"]),
        ({"guidance_scale": float("nan")}, ["guidance_scale"]),
        ({"guidance_scale": -1}, ["guidance_scale"]),
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
