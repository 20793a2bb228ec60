"""Previews: by a tiny decoder, in the plan, or by a linear map; what is painted stays."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tightfit
import torch
from safetensors.torch import load_file, save_file
from tightfit.runtime import previews
from tightfit.runtime.adapters.vae import Vae
from tightfit.runtime.errors import OutOfMemoryError
from tightfit.runtime.infotext import parse
from tightfit.runtime.models.families.family import Role
from tightfit.runtime.models.hub import BESIDE
from tightfit.runtime.planner.estimate import ESTIMATOR
from tightfit.runtime.planner.plan import Plan
from tightfit.runtime.planner.wishes import Wishes

REQUEST = tightfit.Request(
    "a rocket", seed=1, num_inference_steps=4, width=64, height=64, scheduler="euler_a"
)
PREVIEW = "preview_decoder"


class Full:
    """A session that there is no room to call."""

    notices = ()

    def __call__(self, **_):
        raise OutOfMemoryError("injected")


@pytest.fixture(scope="module")
def emoji():
    wishes = {"precision": "fp32", "residency": "staged", "attention": "sdpa", "tiling": "whole"}
    with tightfit.load("emoji", device="cpu", cfg="batched", **wishes) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def painted(emoji):
    return emoji.generate(REQUEST).images[0]


@pytest.fixture
def taesd(made_once, tmp_path, monkeypatch):
    """A random tiny decoder of TAESD's sizes among the models of a person."""
    from diffusers import AutoencoderTiny

    def write(folder):
        torch.manual_seed(4)
        AutoencoderTiny().save_pretrained(folder)

    models = tmp_path / "models" / "VAE-approx"
    shutil.copytree(made_once("taesd", write), models / "taesd")
    monkeypatch.setenv("TIGHTFIT_MODELS", str(models.parent))
    return models


def shown(pipe, request=REQUEST, every=2):
    """The previews by step, and the result."""
    events = list(pipe.run(request, preview_every=every))
    assert events[-1].result
    return {event.step: event.preview for event in events if event.preview}, events[-1].result


def test_by_the_tiny_decoder(emoji, painted, monkeypatch):
    """The last preview is what that decoder makes of the finished latents; the full one is loaded once."""
    loaded, load = [], emoji.loaded.session
    monkeypatch.setattr(
        emoji.loaded,
        "session",
        lambda component, *given: loaded.append(component.name) or load(component, *given),
    )
    images, result = shown(emoji)
    assert list(images) == [2, 4]
    tiny = emoji.generate(replace(REQUEST, adapters=(Vae(BESIDE["tiny"]),))).images[0]
    assert images[4].tobytes() == tiny.tobytes()
    assert images[2].size == (64, 64)
    assert loaded[: loaded.index("vae_decoder")].count(PREVIEW) == 2 + 4  # before each step too
    assert result.images[0].tobytes() == painted.tobytes()
    assert result.images[0].info == painted.info
    assert result.request == REQUEST.resolve(emoji.spec).request
    assert "preview" not in parse(painted.info["parameters"], "x").request


def test_what_they_cost(emoji):
    plain, few, many = (emoji.plans(replace(REQUEST, preview_every=every))[0] for every in (0, 4, 1))
    assert PREVIEW not in plain.placements
    assert plain.predicted.seconds < few.predicted.seconds < many.predicted.seconds
    assert few.predicted.stages["denoise"] > plain.predicted.stages["denoise"]
    assert few.predicted.stages["decode"] == plain.predicted.stages["decode"]
    job = replace(REQUEST, preview_every=3, num_images=2).resolve(emoji.spec)
    assert job.previews == 2
    assert Plan.from_json(json.dumps(many.to_json())) == many


@pytest.mark.parametrize(
    ("precision", "residency"),
    [("int4", "resident"), ("bf16", "streamed")],
)
def test_what_they_take_is_predicted(precision, residency, tiny_models, taesd):
    """At a size where they take more than the U-Net."""
    request = tightfit.Request("a", seed=1, num_inference_steps=2, width=192, height=128)
    wishes = {"precision": precision, "residency": residency, "attention": "sdpa", "tiling": "whole"}
    with tightfit.load(str(tiny_models["sd1"]), device="cpu", cfg="batched", **wishes) as pipe:
        plain, (images, result), (_, again) = (
            pipe.generate(request),
            shown(pipe, request, 1),
            shown(pipe, request, 1),
        )
    assert len(images) == 2
    assert plain.images[0].tobytes() == result.images[0].tobytes()
    predicted = again.plan.predicted.stages
    assert predicted["denoise"] > 1.3 * plain.plan.predicted.stages["denoise"]
    for stage in ("encode", "denoise", "decode"):
        assert abs(again.stages[stage].peak_bytes - predicted[stage]) <= 0.05 * predicted[stage], stage


def test_without_room_they_are_mapped(tiny_models, taesd, monkeypatch):
    """A budget for painting alone paints the same; memory that runs out in a preview steps down to that."""
    request = tightfit.Request("a", seed=1, num_inference_steps=2, width=192, height=128, scheduler="euler")
    with tightfit.load(str(tiny_models["sd1"]), precision="fp32", device="cpu") as pipe:
        whole = pipe.generate(request).images[0]
        plans = [plan for plan in pipe.plans(replace(request, preview_every=1)) if plan.fits]
        assert PREVIEW in plans[0].placements
        few = min(plans, key=lambda plan: plan.predicted.peak_bytes)
        assert PREVIEW not in few.placements
        run = pipe.loaded.session

        def session(component, placement):
            return Full() if component.role is Role.PREVIEW else run(component, placement)

        monkeypatch.setattr(pipe.loaded, "session", session)
        images, result = shown(pipe, request, 1)
        assert len(images) == 2
        assert "out of memory to denoise (injected)" in result.notices[0]
        assert PREVIEW not in result.plan.placements
        assert result.images[0].tobytes() == whole.tobytes()
    least = few.predicted.peak_bytes + few.predicted.context_bytes
    spec, hardware = pipe.spec, pipe.hardware
    best = tightfit.plan(
        hardware, spec, replace(request, preview_every=1), Wishes(precision="fp32", budget=least)
    )[0]
    assert best.fits
    assert PREVIEW not in best.placements


def test_in_both_passes(emoji):
    request = replace(REQUEST, num_inference_steps=2, hires=2.0, hires_steps=2)
    plain = emoji.generate(request).images[0]
    images, result = shown(emoji, request, 1)
    assert [image.size for image in images.values()] == [(64, 64)] * 2 + [(128, 128)] * 2
    assert result.images[0].tobytes() == plain.tobytes()
    for one in result.passes:
        for stage, predicted in one.plan.predicted.stages.items():
            assert not predicted or abs(one.stages[stage].peak_bytes - predicted) <= 0.05 * predicted, stage


def test_they_slow_no_painting(emoji):
    """Whatever the budget: it fits with previews where it fits without, and paints about as fast."""
    wish = replace(REQUEST, preview_every=1, width=256, height=256)
    least, most = (emoji.hardware.context_bytes + count * 2**20 for count in (20, 90))
    kinds, kept = set(), []
    for budget in range(least, most, 2**21):
        wishes = Wishes(precision="fp32", attention="sdpa", budget=budget)
        plain, best = (
            tightfit.plan(emoji.hardware, emoji.spec, request, wishes)[0]
            for request in (replace(wish, preview_every=0), wish)
        )
        assert plain.fits == best.fits
        painting = {name: placement for name, placement in best.placements.items() if name != PREVIEW}
        if best.fits:
            estimate = ESTIMATOR.estimate(emoji.hardware, wish.resolve(emoji.spec), wishes)
            without = estimate.plan(best.cfg, painting, budget)
            assert without.predicted.seconds <= 1.1 * plain.predicted.seconds
            kinds.add((best.denoiser.residency, PREVIEW in best.placements))
            if best.denoiser.kept_bytes and PREVIEW in best.placements:
                filled = best.predicted.peak_bytes / (budget - best.predicted.context_bytes)
                kept.append(filled)
    assert {shown for _, shown in kinds} == {True, False}
    assert kept
    assert max(kept) > 0.9  # what the decoder leaves is for weights


def test_a_saved_plan_knows_nothing_of_them(emoji, painted):
    plan = emoji.plans(REQUEST)[0]
    with tightfit.load("emoji", device="cpu", plan=plan) as pipe:
        images, result = shown(pipe)
        assert PREVIEW in result.plan.placements
        plain = pipe.generate(REQUEST)
    assert len(images) == 2
    assert plain.plan.placements == plan.placements
    assert result.images[0].tobytes() == plain.images[0].tobytes() == painted.tobytes()


def test_which_decoder_is_for_a_model(tiny_models, taesd):
    """That of its family, by its name; what is broken, or no decoder, is passed over."""
    specs = {family: tightfit.inspect(str(folder)) for family, folder in tiny_models.items()}
    folders = {family: (found := previews.decoder(spec)) and found.folder for family, spec in specs.items()}
    assert folders == {"sd1": taesd / "taesd", "sd2": taesd / "taesd", "sdxl": None}
    previews._FOUND.clear()
    shutil.move(taesd / "taesd", taesd / "taesdxl")
    assert previews.decoder(specs["sd1"]) is None
    decoder = previews.decoder(specs["sdxl"])
    assert decoder is previews.decoder(specs["sdxl"])
    assert decoder
    assert (decoder.folder, decoder.role) == (taesd / "taesdxl", Role.PREVIEW)
    previews._FOUND.clear()
    weights = taesd / "taesdxl" / "diffusion_pytorch_model.safetensors"
    stored = load_file(weights)
    stored.pop("decoder.layers.3.conv.0.weight")
    save_file(stored, weights)
    (taesd / "taesdxl_decoder.safetensors").write_bytes(b"no header")
    (taesd / "taesdxl_decoder.pth").touch()
    assert previews.decoder(specs["sdxl"]) is None
    own = Vae(BESIDE["tiny"]).apply(specs["sd1"])
    decoder = previews.decoder(own)
    assert decoder
    assert decoder.tensors == own.decoder.tensors


def test_the_map_is_the_published_one(tiny_models):
    """As diffusers' documentation has SDXL's, in 0..255, and stable-diffusion.cpp SD 1.x's."""
    latents = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(2))
    weights = torch.tensor([[60, -60, 25, -70], [60, -5, 15, -50], [60, 10, -5, -35.0]])
    theirs = torch.einsum("lxy,rl -> xyr", latents[0], weights) + torch.tensor([150, 140, 130.0])
    ours = previews.mapped(tightfit.inspect(str(tiny_models["sdxl"])), latents.numpy())
    assert np.abs((ours + 1) * 127.5 - theirs.numpy()).max() < 1e-3
    factors = [
        [0.337366, 0.216344, 0.257386], [0.165636, 0.386828, 0.046994],
        [-0.267803, 0.237036, 0.223517], [-0.178022, -0.200862, -0.678514],
    ]  # fmt: skip
    constant = torch.tensor([-0.017478, -0.055834, -0.105825])
    theirs = torch.einsum("lxy,lr -> xyr", latents[0], torch.tensor(factors)) + constant
    ours = previews.mapped(tightfit.inspect(str(tiny_models["sd2"])), latents.numpy())
    assert np.abs(ours - theirs.numpy()).max() < 5e-3  # ours are rounded


def test_the_map_of_the_emoji(emoji, painted, mapped=previews.mapped):
    """It is near the picture, made small."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            previews, "mapped", lambda spec, latents: seen.append(mapped(spec, latents)) or seen[-1]
        )
        patch.setattr(previews, "decoder", lambda _: None)
        images, result = shown(emoji)
    assert PREVIEW not in result.plan.placements
    small = np.asarray(painted.resize((8, 8), 4), float) / 127.5 - 1  # 4 is the mean of a box
    assert np.sqrt(np.square(seen[-1].clip(-1, 1) - small).mean()) < 0.3
    assert images[4].size == painted.size
    assert result.images[0].tobytes() == painted.tobytes()
