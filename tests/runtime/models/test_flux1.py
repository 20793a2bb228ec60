"""Flux.1, tiny and random: diffusers' own pipelines are the reference of dev and schnell, and plans know what
they take."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tightfit
import torch
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models import schedulers
from tightfit.runtime.models.families import parts

WAY = {"device": "cpu", "attention": "sdpa", "tiling": "whole"}  # as few plans as can be
OBLONG = tightfit.Request("a red heart", width=64, height=96, num_inference_steps=3, seed=5)
CASES = {
    "oblong": OBLONG,
    "cut": tightfit.Request(
        "A cat. 心 </s> " * 60, width=128, height=64, num_inference_steps=2, seed=7, guidance_scale=6.0
    ),
    "empty": tightfit.Request("", width=64, height=64, num_inference_steps=1, seed=1, guidance_scale=1.0),
}


@pytest.fixture(scope="module", autouse=True)
def in_parts():
    """Wide layers answer some of these pictures' tokens at a time, as they do of large ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "AT_ONCE", 2**18)
        yield


@pytest.fixture(scope="module")
def dev(tiny_model):
    return tiny_model("flux1-dev")


@pytest.fixture(scope="module")
def pipe(dev, opened):
    return opened("FluxPipeline", dev)


def reference(pipe, request, **options):
    image = pipe(
        prompt=request.prompt, output_type="np", width=request.width, height=request.height,
        num_inference_steps=request.num_inference_steps, guidance_scale=request.guidance_scale or 3.5,
        generator=torch.Generator().manual_seed(request.seed), **options,
    ).images[0]  # fmt: skip
    return (image * 255).round()


def test_pictures_are_diffusers(dev, pipe, check_pictures, decibels):
    check_pictures(dev, CASES, lambda request: reference(pipe, request))
    wanted, other = (reference(pipe, replace(OBLONG, guidance_scale=scale)) for scale in (3.5, 6.0))
    assert decibels(wanted, other) < 60  # which guidance changes


def test_schnell_has_shorter_texts_and_no_guidance(decibels, check_predicted, tiny_model, opened):
    schnell = tiny_model("flux1-schnell")
    theirs = opened("FluxPipeline", schnell)
    with tightfit.load(str(schnell), precision="fp32", residency="staged", **WAY) as ours:
        result = ours.generate(replace(OBLONG, guidance_scale=2.0))
        assert ours.spec.default_steps == 4
    assert decibels(result.images[0], reference(theirs, OBLONG, max_sequence_length=256)) >= 75
    assert decibels(result.images[0], reference(theirs, OBLONG)) < 60
    assert any("--guidance-scale 2 changes nothing" in notice for notice in result.notices)
    check_predicted(result)


def test_painting_over_is_diffusers(dev, pipe, check_painted_over, opened):
    theirs = opened("FluxInpaintPipeline", **pipe.components)
    check_painted_over(dev, OBLONG, lambda request, **given: reference(theirs, request, **given))


@pytest.mark.parametrize(("name", "mu"), [("dev", 1.15), ("schnell", 0.0)])
def test_noise_levels_are_the_schedulers(name, mu, tiny_model):
    """1024x1024 has 4096 tokens, for which diffusers shifts dev's by 1.15."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = tiny_model(f"flux1-{name}")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.2, 5), mu=mu)
    spec = tightfit.inspect(str(folder))
    ours = schedulers.make(schedulers.default(spec), spec, 5, size=(1024, 1024))
    torch.testing.assert_close(ours.sigmas, scheduler.sigmas, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def int4(dev, made_once):
    return made_once("models/flux1-dev-int4", lambda folder: tightfit.export_model(str(dev), folder, "int4"))


def test_an_export_streams(int4, check_predicted):
    """What all tokens are scaled by, and both ends, stay int8."""
    formats = tightfit.inspect(str(int4)).denoiser.formats
    wide = {name for name, form in formats.items() if form == "int8"}
    single, joint = "single_transformer_blocks.0", "transformer_blocks.1"
    assert {
        f"{single}.norm.linear",
        f"{joint}.norm1_context.linear",
        "norm_out.linear",
        "time_text_embed.guidance_embedder.linear_2",
    } <= wide
    assert formats["proj_out"] == "int8-g64"
    few = f"{single}.proj_mlp", f"{single}.proj_out", f"{joint}.attn.add_q_proj", f"{joint}.ff_context.net.2"
    assert {formats[name] for name in few} == {"int4-g64"}
    images = {}
    for residency in ("resident", "streamed"):
        with tightfit.load(str(int4), residency=residency, **WAY | {"tiling": "tiled"}) as ours:
            if residency == "resident":
                ours.generate(OBLONG)  # what stays is loaded
            result = ours.generate(OBLONG)
        check_predicted(result)
        images[residency] = result.images[0].tobytes()
    assert images["resident"] == images["streamed"]


@pytest.mark.parametrize(("precision", "residency"), [("bf16", "streamed"), ("int8-dynamic", "staged")])
def test_what_other_precisions_take_is_known(dev, precision, residency, check_predicted):
    with tightfit.load(str(dev), precision=precision, residency=residency, **WAY) as ours:
        check_predicted(ours.generate(OBLONG))


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"clip_skip": 2}, "leave out clip skip"),
        ({"negative_prompt": "ugly"}, "takes no negative prompt"),
        ({"guidance_rescale": 0.5}, "changes nothing where a step takes one prediction: leave it out"),
        ({"width": 72}, "not a multiple of 16"),
        ({"scheduler": "ddim"}, "trained by flow matching"),
    ],
)
def test_what_it_does_not_do_is_refused(dev, asked, why):
    with pytest.raises(TightfitError, match=why):
        replace(OBLONG, **asked).resolve(tightfit.inspect(str(dev)))


@pytest.mark.parametrize(
    ("file", "changes", "why"),
    [
        ("transformer/config.json", {"joint_attention_dim": 96}, "files of different models were mixed"),
        ("transformer/config.json", {"in_channels": 384, "out_channels": 64}, "reads pictures too"),
        ("transformer/config.json", {"axes_dims_rope": [8, 8]}, "axes_dims_rope of 16"),
        ("text_encoder/config.json", {"hidden_size": 16}, "files of different models were mixed"),
        ("model_index.json", {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]}, "projection"),
        ("vae/config.json", {"_class_name": "AutoencoderKLFlux2"}, r"not Flux\.1's AutoencoderKL"),
    ],
)
def test_other_models_are_refused(dev, tmp_path, file, changes, why):
    mixed = tmp_path / "mixed"
    shutil.copytree(dev, mixed)
    file = mixed / file
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(TightfitError, match=why):
        tightfit.inspect(str(mixed))
