"""Several pictures in one call of the U-Net: the same pictures, in the memory that was predicted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tightfit
from tightfit.runtime.errors import OutOfMemoryError
from tightfit.runtime.pipeline import Pipeline
from tightfit.runtime.planner import choose
from tightfit.runtime.planner.plan import Plan
from tightfit.runtime.request import Job, Request, together

ONE_WAY: dict[str, Any] = {"precision": "fp32", "attention": "sdpa", "tiling": "whole"}
SIZE: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 3}
PROMPTS = (
    Request("a red heart", seed=1, **SIZE),
    Request("a (cat:1.3) at [night|day]", negative_prompt="blurred", seed=11, **SIZE),
    Request("a red heart", seed=5, **SIZE),
    Request("a dog AND a tree :0.5", seed=6, **SIZE),
    Request("a red heart", negative_prompt="", seed=1, **SIZE),
)


def planned(pipeline: Pipeline, job: Request, count: int) -> Plan:
    """The way of so many pictures a call, marked as the one to take."""
    plans = pipeline.plans(job)
    return next(plan for plan in plans if plan.images_per_call == count)


def pictures(pipeline: Pipeline, job: Request) -> list[np.ndarray]:
    return [np.asarray(image, int) for image in pipeline.generate(job).images]


@pytest.fixture
def at_once(monkeypatch):
    """However fast it is predicted to be, as many at once as may be."""
    monkeypatch.setattr(choose, "WIDER", 0.0)


@pytest.mark.parametrize(
    ("family", "residency"), [("sd1", "resident"), ("sd1", "staged"), ("sdxl", "streamed")]
)
def test_pictures_are_as_alone_and_the_peak_as_predicted(tiny_models, at_once, family, residency):
    ways = {**ONE_WAY, "residency": residency, "cfg": "sequential" if residency == "staged" else "batched"}
    with tightfit.load(str(tiny_models[family]), device="cpu", images_per_call=4, **ways) as pipe:
        jobs = [request.resolve(pipe.spec) for request in PROMPTS]
        alike = [job for job in jobs if job.branches == jobs[0].branches]
        alike = [replace(alike[n % len(alike)], seed=n) for n in range(5)]
        whole = together(alike)
        plan = pipe.plans(whole)[0]
        assert (plan.images_per_call, plan.images_per_decode) == (4, 4), plan.summary()
        pipe.generate(whole)  # in the first call of a first request the decoder is not there yet
        result = pipe.generate(whole)
        assert result.plan.images_per_call == 4
        assert result.peak_bytes == pytest.approx(plan.predicted.peak_bytes, rel=0.05)
        assert [image.info["parameters"].count(f"Seed: {n},") for n, image in enumerate(result.images)] == [
            1
        ] * 5
    with tightfit.load(str(tiny_models[family]), device="cpu", **ways) as pipe:
        for job, image in zip(alike, result.images, strict=True):
            planned_alone = pipe.plans(job)[0]
            assert planned_alone.images_per_call == planned_alone.images_per_decode == 1
            (alone,) = pictures(pipe, job.request)
            assert np.abs(alone - np.asarray(image, int)).max() <= 1


def test_prompts_of_one_job_may_be_of_several_parts(sd1, at_once):
    """AND has weights of its own, in each picture."""
    requests = [replace(PROMPTS[3], prompt=f"a dog AND a tree :{weight}") for weight in (0.5, 2)]
    with tightfit.load(str(sd1), device="cpu", residency="resident", images_per_call=2, **ONE_WAY) as pipe:
        jobs = [request.resolve(pipe.spec) for request in requests]
        made = pictures(pipe, together(jobs))
        assert pipe.plans(together(jobs))[0].images_per_call == 2
        for request, image in zip(requests, made, strict=True):
            assert np.abs(pictures(pipe, request)[0] - image).max() <= 1
        assert np.abs(made[0] - made[1]).max() > 1


def test_what_differs_in_more_is_not_joined(sd1):
    spec = tightfit.inspect(str(sd1))
    one, other = (Request("a", seed=1, **{**SIZE, "width": width}).resolve(spec) for width in (64, 96))
    with pytest.raises(ValueError, match="several plans"):
        together([one, other])
    assert together([one]) is one


def test_a_request_alone_is_one_picture_a_call_unless_it_is_wished(sd1):
    with tightfit.load(str(sd1), device="cpu", residency="resident", **ONE_WAY) as pipe:
        assert {plan.images_per_call for plan in pipe.plans(replace(PROMPTS[0], num_images=8))} == {1}


def test_memory_that_runs_out_goes_on_with_fewer(sd1, at_once, monkeypatch):
    from tightfit.runtime.backends.torch.backend import TorchSession

    request = replace(PROMPTS[0], num_images=4)
    with tightfit.load(str(sd1), device="cpu", residency="resident", images_per_call=4, **ONE_WAY) as pipe:
        expected = pictures(pipe, request)
        call, rows = TorchSession.__call__, []

        def full(self, **arrays):
            if "sample" in arrays:
                rows.append(len(arrays["sample"]))
                if rows[-1] > 4 and len(rows) > 2:
                    raise OutOfMemoryError("no room")
            return call(self, **arrays)

        monkeypatch.setattr(TorchSession, "__call__", full)
        result = pipe.generate(request)
        assert result.plan.images_per_call < 4
        assert max(rows[3:]) <= 4
        for image, other in zip(result.images, expected, strict=True):
            assert np.abs(np.asarray(image, int) - other).max() <= 1


def test_a_saved_plan_has_as_many(sd1, at_once, tmp_path: Path):
    import json

    request = replace(PROMPTS[0], num_images=2)
    with tightfit.load(str(sd1), device="cpu", residency="resident", images_per_call=2, **ONE_WAY) as pipe:
        plan = pipe.plans(request)[0]
    assert plan.images_per_call == 2
    read = Plan.from_json(json.dumps(plan.to_json()))
    assert read == plan
    with tightfit.load(str(sd1), device="cpu", plan=read) as pipe:
        assert pipe.plans(request)[0].images_per_call == 2
        assert pipe.plans(PROMPTS[0])[0].images_per_call == 1
    old = {name: value for name, value in plan.to_json().items() if name != "images_per_call"}
    assert Plan.from_json(json.dumps(old)).images_per_call == 1
    for name in ("images_per_call", "images_per_decode"):
        with pytest.raises(tightfit.TightfitError, match="pictures a call"):
            Plan.from_json(json.dumps({**old, name: 10**9}))
    assert isinstance(PROMPTS[0].resolve(tightfit.inspect(str(sd1))), Job)
