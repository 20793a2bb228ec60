"""Image to image and inpainting against diffusers' own pipelines, and what of a picture must stay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tightfit
import torch
from PIL import Image
from tightfit.benchmarks.metrics import psnr
from tightfit.runtime.adapters.vae import Vae
from tightfit.runtime.backends.torch.backend import TorchSession
from tightfit.runtime.conditions import asked, pasting
from tightfit.runtime.conditions.image import ImageToImage
from tightfit.runtime.conditions.input_pictures import open_picture
from tightfit.runtime.conditions.mask import Inpainting
from tightfit.runtime.errors import OutOfMemoryError, TightfitError
from tightfit.runtime.infotext import parse

SIZE = {"width": 64, "height": 64, "num_inference_steps": 5}
PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
    (64, 64), 3
)
WHITE = np.zeros((64, 64), np.uint8)
WHITE[16:50, 8:40] = 255
KINDS = {
    "euler": "EulerDiscreteScheduler", "ddim": "DDIMScheduler", "euler_a": "EulerAncestralDiscreteScheduler",
}  # fmt: skip


@pytest.fixture(scope="module")
def inpainting_models(with_channels):
    return {family: with_channels(family, 9) for family in ("sd1", "sdxl")}


def by_diffusers(folder, what: str, scheduler: str, components=None, **given) -> np.ndarray:
    import diffusers

    xl = "XL" if (folder / "text_encoder_2").exists() else ""
    pipe = getattr(diffusers, f"StableDiffusion{xl}{what}Pipeline")
    own = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None).components
    none = {} if xl else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = pipe(**{**own, **none, **(components or {})})
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, KINDS[scheduler]).from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(3)
    size = {} if what == "Img2Img" else {"width": 64, "height": 64}
    answer = pipe(
        "a cat",
        num_inference_steps=5,
        guidance_scale=5.0,
        generator=generator,
        output_type="np",
        **size,
        **given,
    )
    return (answer.images[0] * 255).round().astype(int)


def ours(folder, scheduler: str, condition, **wishes) -> np.ndarray:
    request = tightfit.Request(
        "a cat", seed=3, guidance_scale=5.0, scheduler=scheduler, conditions=(condition,), **SIZE
    )
    with tightfit.load(str(folder), device="cpu", precision="fp32", **wishes) as pipeline:
        return np.asarray(pipeline.generate(request).images[0]).astype(int)


@pytest.mark.parametrize(
    ("family", "scheduler", "strength"),
    [
        ("sd1", "euler", 0.3), ("sd1", "ddim", 0.8), ("sd1", "euler_a", 1.0), ("sd1", "euler_a", 0.8),
        ("sd2", "euler", 0.8), ("sdxl", "euler", 0.8), ("sdxl", "ddim", 0.3),
    ],
)  # fmt: skip
def test_image_to_image_is_diffusers(family, scheduler, strength, tiny_models):
    folder = tiny_models[family]
    theirs = by_diffusers(folder, "Img2Img", scheduler, image=PICTURE, strength=strength)
    picture = ours(folder, scheduler, ImageToImage(open_picture(PICTURE), strength))
    assert np.abs(picture - theirs).max() <= 1  # of 255: 48 dB at the worst pixel


@pytest.mark.parametrize(
    ("family", "channels", "scheduler", "strength"),
    [
        ("sd1", 4, "euler", 0.5), ("sd1", 4, "euler_a", 1.0), ("sd1", 9, "ddim", 0.5),
        ("sd1", 9, "euler_a", 1.0), ("sdxl", 4, "ddim", 0.5), ("sdxl", 9, "euler_a", 0.5),
    ],
)  # fmt: skip
def test_inpainting_is_diffusers_where_the_mask_is_white(
    family, channels, scheduler, strength, tiny_models, inpainting_models
):
    folder = (inpainting_models if channels == 9 else tiny_models)[family]
    mask = Image.fromarray(WHITE)
    theirs = by_diffusers(folder, "Inpaint", scheduler, image=PICTURE, mask_image=mask, strength=strength)
    condition = Inpainting(open_picture(PICTURE), mask=open_picture(mask), strength=strength, blur=0)
    picture = ours(folder, scheduler, condition)
    assert np.abs(picture - theirs)[WHITE > 0].max() <= 1
    assert (picture == np.asarray(PICTURE))[WHITE == 0].all()


def test_a_faded_edge_lies_inside_the_mask(tiny_models):
    sharp = Inpainting(open_picture(PICTURE), mask=open_picture(Image.fromarray(WHITE)), blur=0)
    faded = ours(tiny_models["sd1"], "euler", replace(sharp, blur=4))
    whole, original = ours(tiny_models["sd1"], "euler", sharp), np.asarray(PICTURE).astype(int)
    assert (faded == original)[WHITE == 0].all()
    assert (faded == whole)[28:38, 18:30].all()
    edge = slice(16, 50), 8
    assert np.abs(faded[edge] - original[edge]).mean() < np.abs(whole[edge] - original[edge]).mean() / 2


def test_only_the_masked_part_is_painted_at_full_size(tiny_models):
    """A part of a large picture is what a small one of that part alone is."""
    large = np.random.default_rng(4).integers(0, 256, (160, 192, 3), dtype=np.uint8)
    large[64:128, 32:96] = np.asarray(PICTURE)
    mask = np.zeros((160, 192), np.uint8)
    mask[80:114, 40:72] = 255
    condition = Inpainting(
        open_picture(large), mask=open_picture(Image.fromarray(mask)), strength=0.8, blur=0, padding=15
    )
    picture = ours(tiny_models["sd1"], "euler", condition)
    assert picture.shape == large.shape
    assert (picture == large)[mask == 0].all()
    assert (picture != large)[mask > 0].any(-1).mean() > 0.9
    # 34 x 32 and 15 pixels around it are 64 x 62, and 64 x 64 in the proportions of the picture
    alone = Inpainting(
        open_picture(large[65:129, 24:88]), mask=open_picture(Image.fromarray(mask[65:129, 24:88])),
        strength=0.8, blur=0,
    )  # fmt: skip
    assert (picture[65:129, 24:88] == ours(tiny_models["sd1"], "euler", alone)).all()


@pytest.mark.parametrize("content", ["fill", "noise", "zeros"])
def test_what_is_under_the_mask_is_not_shown(content, tiny_models):
    """Two pictures that differ under the mask alone are painted alike."""
    other = np.asarray(PICTURE).copy()
    other[WHITE > 0] = 255 - other[WHITE > 0]
    mask = open_picture(Image.fromarray(WHITE))
    if content == "fill":
        a, b = (
            ours(
                tiny_models["sd1"], "euler",
                Inpainting(open_picture(image), mask=mask, strength=0.6, blur=0, content=content),
            )
            for image in (PICTURE, other)
        )  # fmt: skip
        assert np.abs(a - b)[WHITE > 0].max() <= 1
    kept, changed = (
        ours(
            tiny_models["sd1"], "euler",
            Inpainting(open_picture(PICTURE), mask=mask, strength=0.6, blur=0, content=way),
        )
        for way in ("original", content)
    )  # fmt: skip
    assert (kept != changed)[WHITE > 0].any()


@pytest.mark.parametrize(
    ("precision", "residency", "tiling"),
    [("fp32", "staged", "whole"), ("fp32", "resident", "tiled"), ("int8", "staged", "tiled")],
)
def test_the_encoder_is_in_the_plan(precision, residency, tiling, tiny_models):
    request = tightfit.Request("a cat", seed=3, width=192, height=256, num_inference_steps=2)
    asked = replace(request, conditions=(ImageToImage(open_picture(PICTURE), 0.9),))
    wishes = {"precision": precision, "residency": residency, "tiling": tiling, "compute": "fp32"}
    with tightfit.load(str(tiny_models["sd1"]), device="cpu", **wishes) as pipeline:
        results = [pipeline.generate(each) for each in (request, asked, asked)]
    plain, _, result = results
    assert "vae_encoder" in result.plan.placements
    assert "vae_encoder" not in plain.plan.placements
    for stage, measured in result.stages.items():
        if predicted := result.plan.predicted.stages.get(stage):
            assert abs(measured.peak_bytes - predicted) <= 0.05 * predicted, stage
    if residency == "staged":
        assert result.plan.predicted.stages["encode"] > plain.plan.predicted.stages["encode"]


def test_the_same_picture_after_memory_ran_out_in_the_encoder(tiny_models, monkeypatch):
    """What takes less goes on from there, and the notice says where it was."""
    options = {"image": PICTURE, "strength": 0.6, "seed": 3, "num_inference_steps": 5}
    call, failed = TorchSession.__call__, []

    def failing(self, **arrays):
        if "pixels" in arrays and not failed:
            failed.append(True)
            raise OutOfMemoryError("not enough")
        return call(self, **arrays)

    with tightfit.load(str(tiny_models["sd1"]), device="cpu", attention="sdpa", precision="fp32") as pipe:
        wanted = pipe("a cat", **options)
        monkeypatch.setattr(TorchSession, "__call__", failing)
        result = pipe.generate(
            tightfit.Request("a cat", seed=3, num_inference_steps=5, conditions=asked(options))
        )
    assert failed
    assert any(notice.startswith("out of memory to encode") for notice in result.notices)
    assert psnr(result.images[0], wanted) >= 75


def test_fewer_steps_are_counted(tiny_models):
    spec, hardware = tightfit.inspect(str(tiny_models["sd1"])), tightfit.profile("rtx-2060")
    seconds = {}
    for strength in (0.25, 0.5, 1.0):
        condition = ImageToImage(open_picture(PICTURE), strength)
        job = tightfit.Request("a", num_inference_steps=20, conditions=(condition,)).resolve(spec)
        assert job.calls == {0.25: 5, 0.5: 10, 1.0: 20}[strength] + (job.scheduler == "own")
        seconds[strength] = tightfit.plan(hardware, spec, job)[0].predicted.seconds
    assert seconds[0.25] < seconds[0.5] < seconds[1.0]


def test_each_call_of_the_encoder_is_counted(tiny_models, inpainting_models):
    picture, mask = open_picture(PICTURE), open_picture(Image.fromarray(WHITE))
    for folder, condition, count in (
        (tiny_models["sd1"], ImageToImage(picture), 1),
        (tiny_models["sd1"], Inpainting(picture, mask=mask, strength=0.5), 1),
        (inpainting_models["sd1"], Inpainting(picture, mask=mask), 1),
        (inpainting_models["sd1"], Inpainting(picture, mask=mask, strength=0.5), 2),
    ):
        job = tightfit.Request("a", conditions=(condition,)).resolve(tightfit.inspect(str(folder)))
        called = []
        condition.prepare(job, lambda name, **arrays: called.append(name) or [np.zeros((1, 8, 8, 8), "f4")])  # noqa: B023
        assert job.encodings("vae_encoder") == len(called) == count


def test_a_size_that_is_not_said_is_the_pictures(tiny_models):
    spec = tightfit.inspect(str(tiny_models["sd1"]))
    native = spec.native_size
    for size in ((48, 40), (50, 47), (4000, 3000)):
        picture = open_picture(Image.new("RGB", size))
        job = tightfit.Request("a", conditions=(ImageToImage(picture),)).resolve(spec)
        assert job.width % 8 == job.height % 8 == 0
        assert job.width * job.height <= native[0] * native[1]
        assert abs(job.width / job.height - size[0] / size[1]) < 0.25
        assert (job.width <= size[0]) and (job.height <= size[1])


def test_what_cannot_be_asked(tiny_models, inpainting_models):
    picture, mask = open_picture(PICTURE), open_picture(Image.fromarray(WHITE))
    for strength in (0, -1, 1.1, float("nan"), "x"):
        with pytest.raises(TightfitError, match="strength must be a number above 0, up to 1"):
            ImageToImage(picture, strength)
    with pytest.raises(TightfitError, match="make both of one size"):
        Inpainting(picture, mask=open_picture(Image.new("L", (9, 9), 255)))
    with pytest.raises(TightfitError, match="the mask is black"):
        Inpainting(picture, mask=open_picture(Image.new("L", (64, 64))))
    with pytest.raises(TightfitError, match="resize, crop, fill"):
        ImageToImage(picture, resize="x")
    spec = tightfit.inspect(str(tiny_models["sd1"]))
    few = tightfit.Request("a", num_inference_steps=5, conditions=(ImageToImage(picture, 0.1),))
    with pytest.raises(
        TightfitError, match=r"strength 0.1 of 5 steps leaves none to take: ask for 0.2 or more"
    ):
        few.resolve(spec)
    spec = tightfit.inspect(str(inpainting_models["sd1"]))
    for conditions in ((), (ImageToImage(picture),)):
        with pytest.raises(TightfitError, match="is an inpainting model: give a picture and a mask"):
            tightfit.Request("a", conditions=conditions).resolve(spec)
    tightfit.Request("a", conditions=(Inpainting(picture, mask=mask),)).resolve(spec)


def test_by_its_options(tiny_models, tmp_path):
    """What is typed, and diffusers' names in Python, mean the same; a picture carries all but pictures."""
    PICTURE.save(tmp_path / "a.png")
    Image.fromarray(WHITE).save(tmp_path / "mask.png")
    Image.fromarray(255 - WHITE).save(tmp_path / "black.png")
    see_through = PICTURE.copy()
    see_through.putalpha(Image.fromarray(255 - WHITE))
    see_through.save(tmp_path / "alpha.png")
    typed = {"image": str(tmp_path / "a.png"), "mask_image": str(tmp_path / "mask.png"), "strength": 0.6}
    (condition,) = asked({**typed, "mask_blur": 2})
    wanted = Inpainting(
        open_picture(PICTURE), mask=open_picture(Image.fromarray(WHITE)), strength=0.6, blur=2
    )
    assert condition == wanted
    turned = {**typed, "mask_image": str(tmp_path / "black.png"), "invert_mask": True, "mask_blur": 2}
    assert asked(turned) == (wanted,)
    (of_alpha,) = asked({"image": str(tmp_path / "alpha.png"), "mask_padding": 8})
    assert (np.asarray(of_alpha.mask.pixels[..., 0]) == WHITE).all()
    assert asked({"image": str(tmp_path / "a.png")}) == (ImageToImage(open_picture(PICTURE)),)
    assert asked({}) == ()
    with tightfit.load(str(tiny_models["sd1"]), device="cpu", precision="fp32") as pipeline:
        mine = pipeline(
            "a cat", image=PICTURE, mask_image=WHITE, strength=0.6, mask_blur=2, seed=3,
            num_inference_steps=5, guidance_scale=5.0, scheduler="euler",
        )  # fmt: skip
    assert (np.asarray(mine) == ours(tiny_models["sd1"], "euler", wanted)).all()
    text = mine.info["parameters"]
    assert "Denoising strength: 0.6, Mask blur: 2" in text
    carried = parse(text, "x")
    assert carried.asking == {"strength": 0.6, "resize": "resize", "mask_blur": 2, "mask_content": "original"}
    assert carried.notices == ()
    for given, word in (
        ({"strength": 0.5}, "--strength is of a picture to begin with"),
        ({"image": PICTURE, "mask_blur": 3}, "--mask-blur is of a mask"),
        ({"image": PICTURE, "mask_image": WHITE, "mask_blur": 9999}, "mask_blur must be a whole number"),
    ):
        with pytest.raises(TightfitError, match=word):
            asked(given)


def test_what_fades_is_what_pillow_erodes():
    from PIL import ImageFilter

    mask = Image.fromarray((np.random.default_rng(4).random((40, 61)) < 0.97).astype(np.uint8) * 255)
    for radius in (1, 2, 9):
        theirs = mask.filter(ImageFilter.MinFilter(2 * radius + 1))
        assert (np.asarray(pasting._eroded(mask, radius)) == np.asarray(theirs)).all()
    assert not np.asarray(pasting._eroded(mask, 10**6)).any()


def test_another_vae_encodes_too(tiny_models, tmp_path):
    """--vae is of both halves, as diffusers' argument is; a tiny one decodes alone."""
    from diffusers import AutoencoderKL

    torch.manual_seed(7)
    config = AutoencoderKL.load_config(tiny_models["sd1"] / "vae")
    other = AutoencoderKL.from_config(config).eval()
    other.save_pretrained(tmp_path / "vae")
    theirs = by_diffusers(
        tiny_models["sd1"], "Img2Img", "euler", components={"vae": other}, image=PICTURE, strength=0.8
    )
    condition = ImageToImage(open_picture(PICTURE), 0.8)
    picture = ours(tiny_models["sd1"], "euler", condition, adapters=[Vae(tmp_path / "vae")])
    assert np.abs(picture - theirs).max() <= 1
    assert np.abs(picture - ours(tiny_models["sd1"], "euler", condition)).max() > 10
