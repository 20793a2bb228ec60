"""instruct-pix2pix against diffusers' own pipelines, and its third branch in the plan."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import tightfit
import torch
from PIL import Image
from tightfit.runtime.conditions import asked
from tightfit.runtime.conditions.edit import Editing
from tightfit.runtime.conditions.image import ImageToImage
from tightfit.runtime.conditions.input_pictures import open_picture
from tightfit.runtime.conditions.mask import Inpainting
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.infotext import parse, write

PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
    (64, 64), 3
)
WISH = {"seed": 3, "num_inference_steps": 4, "guidance_scale": 6.0}
KINDS = {
    "euler": "EulerDiscreteScheduler", "ddim": "DDIMScheduler", "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}  # fmt: skip


def by_diffusers(folder, scheduler: str, **given) -> np.ndarray:
    xl = (folder / "text_encoder_2").exists()
    own = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None).components
    own["scheduler"] = getattr(diffusers, KINDS[scheduler]).from_config(own["scheduler"].config)
    kind = f"StableDiffusion{'XL' * xl}InstructPix2PixPipeline"
    if xl:
        given |= {"width": 64, "height": 64}
    else:
        own |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        own.pop("image_encoder", None)
    names = ("image_encoder", "feature_extractor") if xl else ()
    pipe = getattr(diffusers, kind)(**{name: part for name, part in own.items() if name not in names})
    pipe.set_progress_bar_config(disable=True)
    asked = {**WISH, "generator": torch.Generator().manual_seed(WISH["seed"]), "output_type": "np", **given}
    del asked["seed"]
    answer = pipe("a cat", image=PICTURE, **asked)
    return (answer.images[0] * 255).round().astype(int)


def ours(pipeline, prompt="a cat", **given) -> np.ndarray:
    return np.asarray(pipeline(prompt, image=PICTURE, **{**WISH, **given})).astype(int)


@pytest.mark.parametrize(
    ("family", "scheduler", "cfg", "scale", "more"),
    [
        ("sd1", "euler_a", "sequential", 2.5, {"negative_prompt": "red"}),
        ("sd1", "dpmpp_2m", "auto", 1.0, {}),
        ("sdxl", "euler", "auto", 1.2, {"guidance_rescale": 0.6}),
    ],
)
def test_editing_is_diffusers(family, scheduler, cfg, scale, more, with_channels):
    folder = with_channels(family, 8)
    theirs = by_diffusers(folder, scheduler, image_guidance_scale=scale, **more)
    with tightfit.load(str(folder), device="cpu", precision="fp32", cfg=cfg) as pipeline:
        picture = ours(pipeline, scheduler=scheduler, image_guidance_scale=scale, **more)
    assert np.abs(picture - theirs).max() <= 1  # of 255: 48 dB at the worst pixel


def test_steps_without_guidance_and_texts_in_parts(with_channels):
    """Without guidance the prompt is read and the picture seen in one branch; a text in two halves is one."""
    folder = with_channels("sd1", 8)
    theirs = by_diffusers(folder, "ddim", guidance_scale=1.0)
    with tightfit.load(str(folder), device="cpu", precision="fp32") as pipeline:
        for more in ({"guidance_scale": 1.0}, {"guidance_end": 0.01}):
            assert np.abs(ours(pipeline, scheduler="ddim", **more) - theirs).max() <= 1
        whole, halves = (
            ours(pipeline, prompt, scheduler="ddim", guidance_start=0.5, guidance_rescale=0.5)
            for prompt in ("a cat", "a cat :0.5 AND a cat :0.5")
        )
    assert np.abs(whole - halves).max() <= 1
    assert np.abs(whole - theirs).max() > 1


@pytest.mark.parametrize(
    ("precision", "residency", "cfg"), [("fp32", "staged", "batched"), ("int8", "resident", "sequential")]
)
def test_three_branches_are_in_the_plan(precision, residency, cfg, with_channels):
    wishes = {"precision": precision, "residency": residency, "cfg": cfg, "compute": "fp32"}
    spec = tightfit.inspect(str(with_channels("sd1", 8)))
    request = tightfit.Request("a cat", conditions=asked({"image": PICTURE}), **WISH)
    job, plain = request.resolve(spec), replace(request, guidance_scale=1.0).resolve(spec)
    assert (job.branches, plain.branches, [*job.prompted], [*plain.prompted]) == (3, 1, [1], [0])
    with tightfit.load(str(spec.folder), device="cpu", **wishes) as pipeline:
        results = [pipeline.generate(request) for _ in range(1 + (residency == "resident"))]
        long = [
            pipeline.plans(replace(each, num_inference_steps=500))[0] for each in (request, plain.request)
        ]
    result = results[-1]
    for stage, measured in result.stages.items():
        if predicted := result.plan.predicted.stages.get(stage):
            assert abs(measured.peak_bytes - predicted) <= 0.05 * predicted, stage
    if cfg == "sequential":  # the denoiser is called three times as often
        assert 2.5 < long[0].predicted.seconds / long[1].predicted.seconds < 3.1


def test_by_its_options(with_channels, tiny_models):
    edits, plain = (tightfit.inspect(str(path)) for path in (with_channels("sd1", 8), tiny_models["sd1"]))
    typed = asked({"image": PICTURE, "image_guidance_scale": 2})
    request = tightfit.Request("a", conditions=typed, **WISH)
    (condition,) = request.resolve(edits).conditions
    assert condition == Editing(open_picture(PICTURE), image_guidance_scale=2)
    assert request.resolve(edits).skipped == 0
    carried = parse(write(request.resolve(edits), "x", "fp32"), "x")
    assert carried.asking == {"image_guidance_scale": 2, "resize": "resize"}
    assert asked({**carried.asking, "image": PICTURE}) == typed
    assert "Image CFG scale: 2," in write(request.resolve(edits), "x", "fp32")
    picture, mask = open_picture(PICTURE), open_picture(Image.new("L", (64, 64), 255))
    for spec, conditions, words in (
        (edits, (), "is a model that edits pictures: give one, and no mask"),
        (edits, (Inpainting(picture, mask=mask),), "give one, and no mask"),
        (edits, (ImageToImage(picture, 0.5),), "strength changes nothing"),
        (plain, typed, "does not edit pictures"),
        (plain, request.resolve(edits).conditions, "does not edit pictures"),
    ):
        with pytest.raises(TightfitError, match=words):
            tightfit.Request("a", conditions=conditions).resolve(spec)
    for wrong in (-1, 101, float("nan"), "x"):
        with pytest.raises(TightfitError, match="image_guidance_scale must be a number from 0 to 100"):
            asked({"image": PICTURE, "image_guidance_scale": wrong})
    with pytest.raises(TightfitError, match="--image-guidance-scale is of a picture to begin with"):
        asked({"image_guidance_scale": 2})
