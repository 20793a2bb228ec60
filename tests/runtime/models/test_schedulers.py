"""Schedulers: a model's own runs as diffusers' pipeline runs it, and a name that is given means one algorithm
or is refused."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec

import pytest
import tightfit
from tightfit.benchmarks.metrics import psnr
from tightfit.benchmarks.parity import FlowMatching, with_scheduler
from tightfit.benchmarks.parity_cases import BETAS, CONSISTENT, EDM, FAMILY, FLOWS, NEEDS, OWN, cases
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models import schedulers
from tightfit.runtime.pipeline import Pipeline
from tightfit.runtime.request import PLAIN, Request
from tightfit.runtime.run import Run


@pytest.fixture(scope="module")
def references(tiny_models):
    """Called with a family and a scheduler config: diffusers' own pipeline, which corrects the scheduler as
    it likes."""
    import diffusers
    import torch

    made = {}

    def pipeline(family: str, config: dict):
        if family not in made:
            made[family] = diffusers.DiffusionPipeline.from_pretrained(
                tiny_models[family], dtype=torch.float32
            )
        return with_scheduler(made[family], config)

    return pipeline


@pytest.fixture(scope="module")
def pipes(tiny_models):
    """Called with a family and a scheduler config: ours."""
    made = {}

    def pipeline(family: str, config: dict) -> Pipeline:
        if family not in made:
            ways = {"residency": "resident", "attention": "sdpa", "tiling": "whole"}  # costed for each config
            made[family] = tightfit.load(str(tiny_models[family]), precision="fp32", device="cpu", **ways)
        made[family].spec = dataclasses.replace(made[family].spec, scheduler=config)
        return made[family]

    yield pipeline
    for pipe in made.values():
        pipe.close()


def compared(references, pipes, family, config, prompt="a red heart", seed=7, **options):
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    theirs = references(family, config)(prompt, generator=generator, **options).images[0]
    return psnr(pipes(family, config)(prompt, seed=seed, **options), theirs)


@pytest.mark.parametrize("name", OWN)
def test_the_models_own_as_diffusers(references, pipes, name):
    if (package := NEEDS.get(name)) and not find_spec(package):
        pytest.skip(f"{package} is not installed")
    family = FAMILY.get(name, "sd1")
    assert (
        compared(references, pipes, family, BETAS | OWN[name], num_inference_steps=4, guidance_scale=4.0) > 75
    )


def test_flow_matching_is_the_class_itself():
    """What the reference adds to it is what the pipelines of SD and SDXL look for, and nothing that it has
    itself."""
    import diffusers

    added = {name for name in vars(FlowMatching) if not name.startswith("_")} - {"config_name"}
    assert added == {"init_noise_sigma", "scale_model_input"}
    assert not any(hasattr(diffusers.FlowMatchEulerDiscreteScheduler, name) for name in added)


def test_every_case_is_one_of_its_kind():
    """The table has a row for each scheduler above and each name; the two configs differ only where a name is
    given."""
    known = list(cases())
    assert len({(case.kind, case.name) for case in known}) == len(known)
    assert {case.name for case in known if case.kind == "a model's own scheduler"} == OWN.keys()
    assert all(case.own == case.theirs for case in known if case.asked is None)


def test_calls_are_as_many_as_timesteps(pipes):
    for name, config in OWN.items():
        if (package := NEEDS.get(name)) and not find_spec(package):
            continue
        spec = pipes("sd1", BETAS | config).spec
        for steps in (1, 2, 3, 4, 5, 11):
            try:
                made = schedulers.make(schedulers.OWN, spec, steps)
            except TightfitError:
                assert (name, steps < 4) == ("pndm-prk", True)  # which diffusers cannot take either
                continue
            assert schedulers.calls(schedulers.OWN, spec, steps) == len(made.timesteps), (name, steps)


def test_steps_that_call_the_unet_twice(pipes, monkeypatch):
    """Heun's five steps are shown as five, though they are nine calls."""
    heun = pipes("sd1", BETAS | OWN["heun"])
    called, predict = [], Run._predict
    monkeypatch.setattr(Run, "_predict", lambda *args: called.append(1) or predict(*args))
    events = [
        event
        for event in heun.run(Request("a", num_inference_steps=5, num_images=2))
        if event.stage == "denoise"
    ]
    assert [(event.step, event.steps) for event in events] == [(i + 1, 10) for i in range(10)]
    assert len(called) == 18


def test_seconds_are_those_of_the_calls(tiny_models):
    from tightfit import inspect
    from tightfit.runtime.machine.hardware import Hardware
    from tightfit.runtime.planner import choose as planner

    spec, machine = inspect(tiny_models["sd1"]), Hardware.detect("cpu")

    def seconds(config, steps):
        plans = planner.plan(
            machine,
            dataclasses.replace(spec, scheduler=BETAS | config),
            Request("a", num_inference_steps=steps),
        )
        return {plan.summary(): plan.predicted.seconds for plan in plans}

    one, two = (seconds({"_class_name": "DDIMScheduler"}, steps) for steps in (100, 200))
    for name, times in (("heun", 2 * 1000 - 1), ("pndm", 1001), ("euler", 1000)):
        own = seconds(OWN[name], 1000)
        for way, first in one.items():
            call = (two[way] - first) / 100
            assert own[way] == pytest.approx(first + (times - 100) * call, rel=1e-6), name


def test_what_is_no_scheduler_of_these_models(pipes):
    for kind in (
        "FooScheduler",
        "CogVideoXDDIMScheduler",
        "DPMSolverMultistepInverseScheduler",
        "os",
        ["evil", "Evil"],
        None,
    ):
        pipe = pipes("sd1", BETAS | {"_class_name": kind})
        with pytest.raises(
            TightfitError, match=r"scheduler_config.json names .*choose --scheduler euler, euler_a"
        ) as caught:
            pipe("a cat", num_inference_steps=1)
        assert repr(kind) in str(caught.value)
        assert pipe("a cat", num_inference_steps=1, scheduler="euler")


@pytest.mark.parametrize("which", FLOWS)
def test_flow_models_by_every_name(references, pipes, which):
    import torch

    options, (family, config, names) = {"num_inference_steps": 4, "guidance_scale": 4.0}, FLOWS[which]
    own = None
    for name, theirs in names.items():
        image = references(family, theirs)(
            "a red heart", generator=torch.Generator("cpu").manual_seed(7), **options
        ).images[0]
        ours = pipes(family, config)("a red heart", seed=7, scheduler=name, **options)
        assert psnr(ours, image) > 75
        own = image if theirs["_class_name"] == config["_class_name"] else own
    assert psnr(pipes(family, config)("a red heart", seed=7, **options), own) > 75
    for name in ("euler_a", "ddim", "lcm"):
        with pytest.raises(
            TightfitError,
            match=f"trained by flow matching, for which there is no {name}: choose --scheduler euler",
        ):
            pipes(family, config)("a red heart", scheduler=name, **options)


@pytest.mark.parametrize(("name", "kind"), EDM.items())
def test_models_in_terms_of_edm(references, pipes, name, kind):
    import torch

    options, config = {"num_inference_steps": 5, "guidance_scale": 3.0}, OWN["edm-dpm"]
    theirs = references("sdxl", config | {"_class_name": kind})
    image = theirs("a red heart", generator=torch.Generator("cpu").manual_seed(7), **options).images[0]
    ours = pipes("sdxl", config)("a red heart", seed=7, scheduler=name, **options)
    assert psnr(ours, image) > 75
    with pytest.raises(TightfitError, match="in EDM's terms, for which there is no ddim"):
        pipes("sdxl", config)("a red heart", scheduler="ddim")


@pytest.mark.parametrize(
    ("pipeline", "clip"),
    [
        ("LatentConsistencyModelPipeline", True),
        ("LatentConsistencyModelPipeline", False),
        ("ORTLatentConsistencyModelPipeline", True),  # Optimum's
    ],
)
def test_latent_consistency_models(sd1_copy, pipeline, clip):
    """Guidance, steps and clip_sample are those of diffusers' own pipeline for them."""
    import torch
    from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(sd1_copy / "unet")
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(dict(unet.config) | {"time_cond_proj_dim": 16}).save_pretrained(
        sd1_copy / "unet"
    )
    config = BETAS | CONSISTENT | {"clip_sample": clip}
    (sd1_copy / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((sd1_copy / "model_index.json").read_text())
    index |= {"_class_name": pipeline, "scheduler": ["diffusers", "LCMScheduler"]}
    (sd1_copy / "model_index.json").write_text(json.dumps(index))
    theirs = LatentConsistencyModelPipeline.from_pretrained(
        sd1_copy, dtype=torch.float32, safety_checker=None
    )
    theirs.set_progress_bar_config(disable=True)
    image = theirs("a cat", generator=torch.Generator().manual_seed(2)).images[0]
    with tightfit.load(str(sd1_copy), precision="fp32", device="cpu") as pipe:
        result = pipe.generate(Request("a cat", seed=2))
        assert psnr(result.images[0], image) > 75
        assert (
            result.request.guidance_scale,
            result.request.num_inference_steps,
            result.request.scheduler,
        ) == (8.5, 4, "lcm")
        assert psnr(pipe("a cat", seed=2, num_inference_steps=5), image) < 60


def test_noise_that_no_generator_draws(pipes, monkeypatch):
    """DPMSolverSDEScheduler takes a seed of its own, or a random one: then the picture's, so that it can be
    made again."""
    pytest.importorskip("torchsde")
    config = BETAS | {"_class_name": "DPMSolverSDEScheduler"}
    first, again, other = (
        pipes("sd1", config)("a cat", seed=seed, num_inference_steps=3) for seed in (1, 1, 2)
    )
    assert first.tobytes() == again.tobytes() != other.tobytes()


@pytest.mark.parametrize(
    ("changes", "package"),
    [
        ({"_class_name": "LMSDiscreteScheduler"}, "scipy"),
        ({"_class_name": "DPMSolverSDEScheduler"}, "torchsde"),
        ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, "scipy"),
    ],
)
def test_a_package_that_is_not_installed_is_said(pipes, changes, package):
    if find_spec(package):
        pytest.skip(f"{package} is installed here")
    with pytest.raises(
        TightfitError,
        match=rf"needs {package} for this: pip install {package}, or choose another --scheduler",
    ):
        pipes("sd1", BETAS | changes)("a cat", num_inference_steps=2)


def test_what_is_not_installed_is_said(pipes, monkeypatch):
    monkeypatch.setattr(schedulers, "KINDS", (*schedulers.KINDS, "NewScheduler"))
    with pytest.raises(
        TightfitError, match="has no NewScheduler: pip install -U diffusers, or choose another --scheduler"
    ):
        pipes("sd1", BETAS | {"_class_name": "NewScheduler"})("a cat", num_inference_steps=2)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (
            {"_class_name": "EulerDiscreteScheduler", "prediction_type": "flow_prediction"},
            "EulerDiscreteScheduler cannot take",
        ),
        ({"beta_schedule": "evil"}, "beta_schedule|evil|is not implemented"),
        ({"timestep_spacing": 3}, "cannot take"),
        ({"beta_end": "0.012"}, "beta_end"),
        ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "nothing finite"),
        ({"trained_betas": [0.1]}, "cannot take"),
    ],
)
def test_configs_that_cannot_be(sd1_copy, changes, word):
    """Found out before a weight is read, and never called damaged weights."""
    (sd1_copy / "scheduler/scheduler_config.json").write_text(
        json.dumps(BETAS | {"_class_name": "DDIMScheduler"} | changes)
    )
    with (
        pytest.raises(TightfitError, match=word) as caught,
        tightfit.load(str(sd1_copy), device="cpu", precision="fp32", residency="staged") as pipe,
    ):
        pipe("a cat", num_inference_steps=4)
    assert "\n" not in str(caught.value)
    assert "damaged" not in str(caught.value)


def test_the_models_own_is_repeated_from_a_picture(pipes, tmp_path):
    pipe = pipes("sd1", BETAS | OWN["heun"])
    image = pipe("a cat", seed=3, num_inference_steps=3)
    exact = json.loads(json.loads(image.info["parameters"].rpartition("tightfit: ")[2]))
    assert (exact["scheduler"], exact["num_inference_steps"]) == ("own", 3)
    fields = {name: exact[name] for name in PLAIN if name in exact}
    assert pipe.generate(Request(**fields)).images[0].tobytes() == image.tobytes()
