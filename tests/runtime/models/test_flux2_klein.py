"""Flux.2 klein, tiny and random: diffusers' own pipeline is the reference, and plans know what it takes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tightfit
import torch
from PIL import Image
from tightfit.runtime import infotext, previews
from tightfit.runtime.asking import request_of
from tightfit.runtime.conditions.input_pictures import open_picture
from tightfit.runtime.conditions.reference import References, check_carried
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models import schedulers
from tightfit.runtime.models.checks import check_fields
from tightfit.runtime.models.families import flux2_klein, qwen3
from tightfit.runtime.models.layouts.diffusers import DiffusersLayout

LONG = "A cat. 心 <|im_end|> " * 60  # more tokens than are read
WAY = {"device": "cpu", "attention": "sdpa", "tiling": "whole"}  # as few plans as can be
CASES = {
    "oblong": tightfit.Request("a red heart", width=64, height=96, seed=5),
    "cut": tightfit.Request(LONG, width=128, height=64, num_inference_steps=3, seed=7),
    "empty": tightfit.Request("", width=64, height=64, num_inference_steps=1, seed=1),
}


def picture(height, width):
    return open_picture(np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8))


REFERENCES = picture(70, 100), picture(130, 64)  # of which the sides are cut


@pytest.fixture(scope="module", autouse=True)
def in_parts(parts_at_once):
    """Wide layers answer five parts of these pictures' tokens, as they do of large ones."""
    parts_at_once(2**18)


@pytest.fixture(scope="module")
def klein(tiny_model):
    return tiny_model("flux2-klein")


@pytest.fixture(scope="module")
def pipe(klein, opened):
    return opened("Flux2KleinPipeline", klein)


def noise(request, channels=32):
    shape = 1, channels, request.height // 16, request.width // 16
    return torch.randn(shape, generator=torch.Generator().manual_seed(request.seed))


def reference(pipe, request, **options):
    options = {"num_inference_steps": request.num_inference_steps or 4, "guidance_scale": 1.0} | options
    size = {"width": request.width, "height": request.height}
    image = pipe(prompt=request.prompt, latents=noise(request), output_type="np", **size, **options).images[0]
    return (image * 255).round()


def test_pictures_are_diffusers(klein, pipe, check_pictures):
    check_pictures(klein, CASES, lambda request: reference(pipe, request))


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        (qwen3.FIELDS, "rope_scaling", {"rope_type": []}),
        (qwen3.FIELDS, "rope_parameters", {"rope_type": "yarn"}),
        (flux2_klein._DECODER.fields, "patch_size", [2, 4]),
    ],
)
def test_impossible_configs_are_refused(fields, name, value):
    with pytest.raises(TightfitError, match=f"impossible {name}"):
        check_fields(Path("config.json"), {name: value}, fields)


def test_a_model_that_is_not_distilled_is_guided(klein, pipe, tmp_path, decibels):
    shutil.copytree(klein, base := tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"is_distilled": False}))
    spec = tightfit.inspect(str(base))
    assert (spec.default_steps, spec.default_guidance) == (50, 4.0)
    pipe.register_to_config(is_distilled=False)
    shown = References(REFERENCES[:1])  # in both halves
    request = replace(CASES["oblong"], num_inference_steps=3, conditions=(shown,))
    with tightfit.load(str(base), precision="fp32", residency="staged", **WAY) as ours:
        image = ours.generate(request).images[0]
    images = [one.image for one in shown.pictures]
    wanted = reference(pipe, request, guidance_scale=4.0, image=images)
    pipe.register_to_config(is_distilled=True)
    assert decibels(image, wanted) >= 75
    assert decibels(image, reference(pipe, request, image=images)) < 40


@pytest.mark.parametrize(("size", "steps"), [((1024, 1024), 4), ((64, 96), 9), ((1088, 1088), 50)])
def test_noise_levels_are_the_pipelines(klein, pipe, size, steps):
    """Of 1088x1088 pixels there are more than 4300 tokens, from where they no longer follow the steps."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    mu = compute_empirical_mu(size[0] * size[1] // 256, steps)
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    spec = tightfit.inspect(str(klein))
    ours = schedulers.make(schedulers.default(spec), spec, steps, size=size)
    assert torch.equal(ours.sigmas, pipe.scheduler.sigmas)
    assert torch.equal(ours.timesteps, pipe.scheduler.timesteps)


@pytest.mark.parametrize("name", ["euler", "Euler Simple", "heun", "DPM++ 2M Karras", "unipc"])
def test_samplers_of_flows_follow_a_straight_line_to_its_end(klein, name):
    """Where noise minus data is the same at all levels, each method has the data at the end."""
    spec = tightfit.inspect(str(klein))
    scheduler = schedulers.make(name, spec, 6, size=(64, 64))
    data, drawn = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = drawn
    for timestep in scheduler.timesteps:
        latents = scheduler.step(drawn - data, timestep, latents).prev_sample
    assert scheduler.timesteps[0] > 999
    torch.testing.assert_close(latents, data, atol=1e-4, rtol=0)


def test_image_to_image_begins_with_the_encoded_picture(klein, pipe, decibels, check_predicted):
    from tightfit.runtime.conditions.image import ImageToImage

    pixels = np.random.default_rng(0).integers(0, 256, (96, 64, 3), np.uint8)
    condition = ImageToImage(open_picture(Image.fromarray(pixels)), strength=0.5)
    request = replace(CASES["oblong"], conditions=(condition,), num_inference_steps=6)
    with tightfit.load(str(klein), precision="fp32", residency="staged", **WAY) as ours:
        result = ours.generate(request)
    check_predicted(result)
    encoded = pipe._encode_vae_image(
        torch.from_numpy(pixels / 127.5 - 1).float().permute(2, 0, 1)[None], None
    )
    levels = schedulers.make("euler", tightfit.inspect(str(klein)), 6, size=(96, 64)).sigmas
    sigmas = levels[3:-1]
    latents = sigmas[0] * noise(request) + (1 - sigmas[0]) * encoded
    mu_free = pipe.scheduler.from_config(pipe.scheduler.config, use_dynamic_shifting=False, shift=1.0)
    whole, pipe.scheduler = pipe.scheduler, mu_free
    image = pipe(
        prompt=request.prompt, latents=latents, output_type="np", sigmas=sigmas.numpy(), guidance_scale=1.0,
        num_inference_steps=3, width=64, height=96,
    ).images[0]  # fmt: skip
    pipe.scheduler = whole
    assert decibels(result.images[0], (image * 255).round()) >= 75


def test_reference_pictures_are_read_as_diffusers_does(klein, pipe, decibels, check_predicted):
    request = replace(CASES["oblong"], num_inference_steps=2)
    wanted = {
        count: reference(pipe, request, image=[one.image for one in REFERENCES[:count]]) for count in (1, 2)
    }
    assert decibels(wanted[1], wanted[2]) < 60  # both are seen
    for residency, counts in {"staged": (1, 2), "streamed": (2,)}.items():
        with tightfit.load(str(klein), precision="fp32", residency=residency, **WAY) as ours:
            for count in counts:
                asked = replace(request, conditions=(References(REFERENCES[:count]),))
                result = ours.generate(asked)
                assert decibels(result.images[0], wanted[count]) >= 75, (residency, count)
                check_predicted(result)
    carried = infotext.parse(result.images[0].info["parameters"], "a.png")
    assert "Reference pictures: 2" in result.images[0].info["parameters"]
    assert not carried.notices
    with pytest.raises(TightfitError, match=r"a\.png was painted after 2 reference pictures"):
        [*check_carried(carried.asking["reference"], (), "a.png")]
    assert not [*check_carried(carried.asking["reference"], "ab", "a.png")]
    (note,) = check_carried(carried.asking["reference"], "a", "a.png")
    assert note == "a.png was painted after 2 reference pictures, and 1 is given"


@pytest.mark.parametrize("sides", [(70, 100), (900, 1300), (64, 64)])
def test_reference_pictures_are_made_smaller_as_diffusers_does(klein, pipe, sides):
    from tightfit.runtime.conditions.reference import pixels

    whole, spec, processor = picture(*sides), tightfit.inspect(str(klein)), pipe.image_processor
    (ours, size) = pixels(whole, spec), References((whole,)).size(spec)
    image = processor._resize_if_exceeds_area(whole.image)
    width, height = (side // 16 * 16 for side in image.size)
    theirs = processor.preprocess(image, height=height, width=width, resize_mode="crop")
    assert size == (height, width)
    assert np.array_equal(ours, theirs.numpy())


@pytest.mark.parametrize(
    ("model", "count", "why"),
    [("emoji", 1, "--reference is not for"), (None, 9, "at most 8"), (None, 0, "64 a side or more")],
)
def test_reference_pictures_that_cannot_be_read_are_refused(klein, model, count, why):
    pictures = [REFERENCES[0].image] * count or Image.new("RGB", (32, 64))
    with pytest.raises(TightfitError, match=why):
        request_of({"prompt": "a cat", "reference": pictures}).resolve(tightfit.inspect(model or str(klein)))


def test_previews_are_the_colours_of_patches():
    latents = np.random.default_rng(0).normal(size=(1, 128, 2, 3)).astype(np.float32)
    (whole,) = flux2_klein.unpack(torch.from_numpy(latents), (2, 2))
    colours = torch.zeros(3, 32)
    for channel, values in flux2_klein._COLOURS.items():
        colours[:, channel] = torch.tensor(values)
    wanted = torch.nn.functional.avg_pool2d(torch.einsum("rc,chw->rhw", colours, whole), 2)
    wanted += torch.tensor(flux2_klein._CONSTANT)[:, None, None]
    spec: Any = SimpleNamespace(design=flux2_klein.Flux2Klein(), folder=None, source=None)
    np.testing.assert_allclose(previews.mapped(spec, latents), wanted.permute(1, 2, 0), atol=1e-6)


@pytest.fixture(scope="module")
def int4(klein, made_once):
    return made_once(
        "models/flux2-klein-int4", lambda folder: tightfit.export_model(str(klein), folder, "int4")
    )


def test_an_export_streams_and_has_what_is_read_alone(int4, check_predicted):
    """Of the text encoder's 28 layers 27, and of its two halves no head."""
    spec = tightfit.inspect(str(int4))
    text, denoiser = spec.text_encoders[0], spec.denoiser
    assert {"model.layers.26", "model.layers.27"} & {name[:15] for name in text.tensors} == {
        "model.layers.26"
    }
    assert text.formats["model.embed_tokens"] == "int8"
    assert {*denoiser.formats.values()} == {"int4-g64", "int8-g64", "int8"}
    images = {}
    for residency in ("resident", "streamed"):
        with tightfit.load(str(int4), residency=residency, **WAY | {"tiling": "tiled"}) as ours:
            if residency == "resident":
                ours.generate(CASES["oblong"])  # what stays is loaded
            result = ours.generate(CASES["oblong"])
        check_predicted(result)
        images[residency] = result.images[0].tobytes()
    assert images["resident"] == images["streamed"]


def test_an_encoder_has_the_convolution_behind_it_in_its_format(int4):
    """Of the tiny model it is too small to be quantised."""
    layers = dict.fromkeys(("encoder.conv_in", "quant_conv", "decoder.conv_in", "post_quant_conv"), "int8")
    manifest = {"precision": "int8", "components": {"vae": {"formats": layers}}}
    formats = replace(DiffusersLayout().read(int4), manifest=manifest)._formats(flux2_klein._ENCODER)
    assert formats is not None and [*formats] == ["encoder.conv_in", "quant_conv"]


@pytest.mark.parametrize(("precision", "residency"), [("bf16", "streamed"), ("int8-dynamic", "staged")])
def test_what_other_precisions_take_is_known(klein, precision, residency, check_predicted):
    with tightfit.load(str(klein), precision=precision, residency=residency, **WAY) as ours:
        check_predicted(ours.generate(CASES["oblong"]))


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"negative_prompt": "ugly"}, "takes no negative prompt"),
        ({"clip_skip": 2}, "clip skip is of CLIP"),
        ({"width": 72}, "not a multiple of 16"),
        ({"scheduler": "ddim"}, "trained by flow matching"),
        ({"guidance_rescale": 0.5}, "changes nothing"),
    ],
)
def test_what_it_does_not_do_is_refused(klein, asked, why):
    with pytest.raises(TightfitError, match=why):
        replace(CASES["oblong"], **asked).resolve(tightfit.inspect(str(klein)))


def test_adapters_of_other_families_are_refused(klein):
    from tightfit.runtime.adapters.prediction import Prediction

    with pytest.raises(TightfitError, match=r"--prediction is not for Flux\.2 klein"):
        replace(CASES["oblong"], adapters=(Prediction("v"),)).resolve(tightfit.inspect(str(klein)))


def test_mixed_files_are_refused(klein, tmp_path):
    shutil.copytree(klein, mixed := tmp_path / "mixed")
    file = mixed / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"joint_attention_dim": 64}))
    with pytest.raises(TightfitError, match="files of different models were mixed"):
        tightfit.inspect(str(mixed))
