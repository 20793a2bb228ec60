"""Z-Image, tiny and random: diffusers' own pipeline is the reference, and plans know what it takes, whose
tokens are as many as a text has."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tightfit
import torch
from PIL import Image
from tightfit.runtime.adapters.vae import Vae
from tightfit.runtime.conditions.image import ImageToImage
from tightfit.runtime.conditions.input_pictures import open_picture
from tightfit.runtime.conditions.mask import Inpainting
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.machine.profiles import profile
from tightfit.runtime.models import schedulers
from tightfit.runtime.planner.candidates import computes, role_compute
from tightfit.runtime.request import together

WAY = {"device": "cpu", "attention": "sdpa", "tiling": "whole"}  # as few plans as can be
# A letter is a token, and 19 are around a text.
CASES = {
    "oblong": tightfit.Request("a red heart", width=64, height=96, num_inference_steps=3, seed=5),
    "32 tokens": tightfit.Request("x" * 13, width=96, height=80, num_inference_steps=2, seed=6),
    "33 tokens": tightfit.Request("x" * 14, width=64, height=64, num_inference_steps=1, seed=6),
    "cut": tightfit.Request(
        "A cat. 心 <|im_end|> " * 60, width=128, height=64, num_inference_steps=2, seed=7
    ),
    "empty": tightfit.Request("", width=64, height=64, num_inference_steps=1, seed=1),
}
GUIDED = replace(CASES["oblong"], guidance_scale=3.5, negative_prompt="ugly")
UNEVEN = replace(GUIDED, negative_prompt="ugly, and a longer text")
LONGER = replace(
    UNEVEN, prompt="a red heart, and a much longer text than the other one is", negative_prompt=None
)


@pytest.fixture(scope="module", autouse=True)
def in_parts(parts_at_once):
    """Wide layers answer some of these pictures' tokens at a time, as they do of large ones."""
    parts_at_once(2**17)


@pytest.fixture(scope="module")
def z_image(tiny_model):
    return tiny_model("z-image")


@pytest.fixture(scope="module")
def pipe(z_image, opened):
    return opened("ZImagePipeline", z_image)


def reference(pipe, request):
    """diffusers adds what it is guided by to the prompt's prediction: one less than ours, and 0 for none."""
    shape = 1, 16, request.height // 8, request.width // 8
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(request.seed))
    image = pipe(
        prompt=request.prompt, negative_prompt=request.negative_prompt, latents=noise, output_type="np",
        width=request.width, height=request.height, num_inference_steps=request.num_inference_steps,
        guidance_scale=(request.guidance_scale or 1.0) - 1,
    ).images[0]  # fmt: skip
    return (image * 255).round()


def test_pictures_are_diffusers(z_image, pipe, check_pictures):
    check_pictures(z_image, CASES, lambda request: reference(pipe, request))


def test_tokens_that_pad_are_seen(pipe, decibels):
    """So that the test above would tell."""
    wanted = [reference(pipe, CASES[name]) for name in ("oblong", "32 tokens")]
    with torch.no_grad():
        for name, before in zip(("cap_pad_token", "x_pad_token"), wanted, strict=True):
            token = getattr(pipe.transformer, name)
            kept = token.clone()
            token.zero_()
            now = reference(pipe, CASES["oblong" if name.startswith("cap") else "32 tokens"])
            token.copy_(kept)
            assert decibels(now, before) < 70


@pytest.mark.parametrize(("what", "strength"), [("Img2Img", 0.5), ("Inpaint", 1.0)])
def test_pictures_to_begin_with_are_diffusers(
    z_image, pipe, what, strength, decibels, check_predicted, opened
):
    draw = np.random.default_rng(1)
    picture = Image.fromarray(draw.integers(0, 256, (12, 8, 3), np.uint8)).resize((64, 96), 3)
    white = np.zeros((96, 64), np.uint8)
    white[16:50, 8:40] = 255
    mask, painted = Image.fromarray(white), slice(None)
    condition, given = ImageToImage(open_picture(picture), strength), {"image": picture, "strength": strength}
    if what == "Inpaint":
        condition = Inpainting(open_picture(picture), mask=open_picture(mask), strength=strength, blur=0)
        given["mask_image"], painted = mask, white > 0
    request = replace(GUIDED, conditions=(condition,), num_inference_steps=6)
    theirs = opened(f"ZImage{what}Pipeline", **pipe.components)
    wanted = theirs(
        prompt=request.prompt, negative_prompt=request.negative_prompt, width=64, height=96,
        guidance_scale=request.guidance_scale - 1, num_inference_steps=6, output_type="np",
        generator=torch.Generator().manual_seed(request.seed), **given,
    ).images[0]  # fmt: skip
    with tightfit.load(str(z_image), precision="fp32", residency="staged", **WAY) as ours:
        result = ours.generate(request)
    check_predicted(result)
    assert decibels(np.asarray(result.images[0])[painted], (wanted * 255).round()[painted]) >= 75


def test_the_tiny_decoder_of_its_vae_paints_what_diffusers_paints(z_image, pipe, tmp_path, decibels, opened):
    """Flux.1's, in one file: a convolution there says how many channels latents have."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(4)
    AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    request = replace(CASES["empty"], adapters=(Vae(file),))
    parts = pipe.components | {"vae": AutoencoderTiny.from_pretrained(tmp_path)}
    theirs = opened("ZImagePipeline", **parts)
    with tightfit.load(str(z_image), precision="fp32", residency="staged", **WAY) as ours:
        image = ours.generate(request).images[0]
    assert decibels(image, reference(theirs, request)) >= 75


@pytest.mark.parametrize("request_", [UNEVEN, LONGER], ids=["negative", "longer"])
def test_guidance_is_diffusers(z_image, pipe, request_, decibels, check_predicted):
    """Texts of two lengths go into a call each. Pictures above are guided by two of one length."""
    wanted = reference(pipe, request_)
    assert decibels(reference(pipe, replace(request_, guidance_scale=1.0)), wanted) < 40
    with tightfit.load(str(z_image), precision="fp32", residency="staged", **WAY) as ours:
        result = ours.generate(request_)
    assert decibels(result.images[0], wanted) >= 75
    check_predicted(result)
    assert result.plan.cfg == "sequential"


def test_texts_of_two_lengths_go_into_no_call_together(z_image):
    spec = tightfit.inspect(str(z_image))
    even, uneven, longer = (request.resolve(spec) for request in (GUIDED, UNEVEN, LONGER))
    assert (even.prompting.lengths, uneven.prompting.lengths, longer.prompting.lengths) == (
        (1, 1),
        (2, 1),
        (1, 3),
    )
    with pytest.raises(ValueError, match="several plans"):
        together([uneven, replace(LONGER, prompt=UNEVEN.negative_prompt).resolve(spec)])
    with tightfit.load(str(z_image), precision="fp32", residency="staged", cfg="batched", **WAY) as ours:
        with pytest.raises(TightfitError, match="in calls of their own, as one is longer: leave out cfg"):
            ours.plans(UNEVEN)
        plan = ours.plans(GUIDED)[0]
    with (
        tightfit.load(str(z_image), plan=plan) as ours,
        pytest.raises(TightfitError, match="as long as the negative one, and one is longer"),
    ):
        ours.plans(UNEVEN)


@pytest.mark.parametrize("is_dynamic", [False, True])
@pytest.mark.parametrize(("size", "steps"), [((1024, 1024), 8), ((64, 96), 9)])
def test_noise_levels_are_the_pipelines(z_image, pipe, size, steps, is_dynamic):
    from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift

    scheduler = pipe.scheduler.from_config(pipe.scheduler.config, use_dynamic_shifting=is_dynamic)
    mu = calculate_shift(size[0] * size[1] // 256)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    spec = tightfit.inspect(str(z_image))
    spec = replace(spec, scheduler={**spec.scheduler, "use_dynamic_shifting": is_dynamic})
    ours = schedulers.make(schedulers.default(spec), spec, steps, size=size)
    torch.testing.assert_close(ours.sigmas, scheduler.sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.timesteps, scheduler.timesteps, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def int4(z_image, made_once):
    return made_once(
        "models/z-image-int4", lambda folder: tightfit.export_model(str(z_image), folder, "int4")
    )


def test_an_export_streams_and_has_what_is_read_alone(int4, check_predicted):
    """Of the text encoder's 36 layers 35. What all tokens are scaled by, and both ends, stay int8."""
    spec = tightfit.inspect(str(int4))
    last = {name[:15] for name in spec.text_encoders[0].tensors} & {"model.layers.34", "model.layers.35"}
    assert last == {"model.layers.34"}
    formats = spec.denoiser.formats
    wide = {name.rpartition(".")[0] for name, form in formats.items() if form == "int8"}
    assert {"all_x_embedder", "t_embedder.mlp", "cap_embedder", "layers.0.adaLN_modulation"} <= wide
    assert {formats[f"layers.1.{name}"] for name in ("attention.to_q", "feed_forward.w2")} == {"int4-g64"}
    images = {}
    for residency in ("resident", "streamed"):
        with tightfit.load(str(int4), residency=residency, **WAY | {"tiling": "tiled"}) as ours:
            if residency == "resident":
                ours.generate(CASES["oblong"])  # what stays is loaded
            result = ours.generate(CASES["oblong"])
        check_predicted(result)
        images[residency] = result.images[0].tobytes()
    assert images["resident"] == images["streamed"]


@pytest.mark.parametrize(("precision", "residency"), [("bf16", "streamed"), ("int8-dynamic", "staged")])
def test_what_other_precisions_take_is_known(z_image, precision, residency, check_predicted):
    with tightfit.load(str(z_image), precision=precision, residency=residency, **WAY) as ours:
        check_predicted(ours.generate(UNEVEN))


def test_it_computes_nothing_in_fp16_but_the_vae(z_image):
    """In which its transformer answers NaN."""
    spec = tightfit.inspect(str(z_image))
    for name, wide in {"rtx-3060-12gb": "bf16", "gtx-1650": "fp32"}.items():
        card = profile(name)
        roles = {component.role: component for component in spec.components.values()}
        made = {role.name: role_compute(card, spec, role, "fp16") for role in roles}
        assert made == {"TEXT": wide, "DENOISER": wide, "DECODER": "fp16"}
    assert "fp16" not in computes(profile("rtx-3060-12gb"), spec)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"clip_skip": 2}, "clip skip is of CLIP"),
        ({"width": 72}, "not a multiple of 16"),
        ({"scheduler": "ddim"}, "trained by flow matching"),
        ({"negative_prompt": "ugly", "guidance_rescale": 0.5}, "give --guidance-scale above 1"),
    ],
)
def test_what_it_does_not_do_is_refused(z_image, asked, why):
    with pytest.raises(TightfitError, match=why):
        replace(CASES["oblong"], **asked).resolve(tightfit.inspect(str(z_image)))


def test_a_negative_prompt_that_changes_nothing_is_told(z_image):
    job = replace(CASES["oblong"], negative_prompt="ugly").resolve(tightfit.inspect(str(z_image)))
    assert [notice.endswith("give --guidance-scale above 1") for notice in job.notices()] == [True]
    assert not [*GUIDED.resolve(job.spec).notices()]


@pytest.mark.parametrize(
    ("folder", "changes", "why"),
    [
        ("transformer", {"siglip_feat_dim": 8}, "reads pictures too"),
        ("transformer", {"all_patch_size": [4]}, "reads pictures too"),
        ("transformer", {"cap_feat_dim": 8}, "files of different models were mixed"),
        ("transformer", {"axes_dims": [8, 8, 8]}, "axes_dims of 24"),
        ("text_encoder", {"num_hidden_layers": 35}, "files of different models were mixed"),
        ("vae", {"_class_name": "AutoencoderKLFlux2"}, "not Z-Image's AutoencoderKL"),
    ],
)
def test_other_models_are_refused(z_image, tmp_path, folder, changes, why):
    mixed = tmp_path / "mixed"
    shutil.copytree(z_image, mixed)
    file = mixed / folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(TightfitError, match=why):
        tightfit.inspect(str(mixed))
