"""SD 3.5, tiny and random: diffusers' own pipelines are the reference, with T5 and without, and plans know
what it takes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tightfit
import torch
from safetensors.torch import load_file
from tightfit.runtime import infotext
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.machine.profiles import profile
from tightfit.runtime.models import schedulers
from tightfit.runtime.pipeline import Pipeline
from tightfit.runtime.planner import choose
from tightfit.runtime.planner.candidates import computes

WAY = {"device": "cpu", "attention": "sdpa", "tiling": "whole"}  # as few plans as can be
OBLONG = tightfit.Request("a red heart", width=64, height=96, num_inference_steps=3, seed=5)
CASES = {
    "oblong": OBLONG,
    "cut": tightfit.Request(
        "A cat. 心 </s> " * 60, width=128, height=64, num_inference_steps=1, seed=7, guidance_scale=7.0
    ),
    "empty": tightfit.Request("", width=64, height=64, num_inference_steps=1, seed=1, guidance_scale=1.0),
    "negative": replace(OBLONG, negative_prompt="ugly, and blurred", num_inference_steps=2),
    "layers": replace(
        OBLONG, num_inference_steps=2, skip_guidance_layers="0,2", skip_layer_guidance_stop=1.0
    ),
}


@pytest.fixture(scope="module")
def sd3(tiny_model):
    return tiny_model("sd3")


@pytest.fixture(scope="module")
def pipe(sd3, opened):
    return opened("StableDiffusion3Pipeline", sd3)


def reference(pipe, request, **options):
    if layers := request.skip_guidance_layers:
        options |= {"skip_guidance_layers": [*map(int, layers.split(","))]}
        options |= {"skip_layer_guidance_stop": request.skip_layer_guidance_stop}
    image = pipe(
        prompt=request.prompt, negative_prompt=request.negative_prompt, output_type="np",
        num_inference_steps=request.num_inference_steps, guidance_scale=request.guidance_scale or 4.5,
        width=request.width, height=request.height,
        generator=torch.Generator().manual_seed(request.seed), **options,
    ).images[0]  # fmt: skip
    return (image * 255).round()


def test_pictures_are_diffusers(sd3, pipe, check_pictures):
    check_pictures(sd3, CASES, lambda request: reference(pipe, request))


def test_calls_without_layers_are_counted(sd3):
    """As shares of calls with all three; no more bytes."""
    spec, machine = tightfit.inspect(str(sd3)), profile("rtx-3060-12gb")
    ways: Any = {"residency": "resident", "attention": "sdpa", "tiling": "whole", "cfg": "sequential"}

    def predicted(steps, **asked):
        request = replace(OBLONG, num_inference_steps=steps, **asked)
        return tightfit.plan(machine, spec, request, tightfit.Wishes(precision="bf16", **ways))[0].predicted

    ten = predicted(10)
    call = (predicted(20).seconds - ten.seconds) / 20
    for layers, stop, calls in (("1", 0.2, 1), ("[0, 2]", 0.21, 2), ("1", 0.05, 0)):
        less = predicted(10, skip_guidance_layers=layers, skip_layer_guidance_stop=stop)
        share = 1 - len(layers.strip("[]").split(",")) / 3
        assert less.seconds - ten.seconds == pytest.approx(calls * share * call, rel=0.05)
        assert less.peak_bytes == ten.peak_bytes
    [refused, *_] = tightfit.plan(
        machine, spec, replace(CASES["layers"]), tightfit.Wishes(cuda_graphs=True, **ways)
    )
    assert "leave out --skip-layers, or --cuda-graphs" in refused.reason


def test_layers_that_are_skipped_are_in_the_text(sd3):
    job = replace(OBLONG, skip_guidance_layers="2 0").resolve(tightfit.inspect(str(sd3)))
    assert any("no step of 3 is between" in notice for notice in job.notices())
    text = infotext.write(job, "sd3", "fp32")
    assert infotext.parse(text, "it").request["skip_guidance_layers"] == "0,2"
    theirs = text.partition(", tightfit:")[0]
    assert infotext.parse(theirs, "it").request["skip_guidance_layers"] == "0,2"
    of_stable_diffusion_cpp = theirs.replace('"0,2"', "[7, 8, 9, ], Skip layer end: 0.3")
    assert not [name for name in infotext.parse(of_stable_diffusion_cpp, "it").request if "skip_" in name[:5]]


@pytest.fixture(scope="module")
def without_t5(tiny_model):
    return tiny_model("sd3-without-t5")


def test_without_t5_its_tokens_are_zeros(without_t5, pipe, decibels, check_predicted, opened):
    parts = {"text_encoder_3": None, "tokenizer_3": None}
    alone = opened("StableDiffusion3Pipeline", without_t5, **parts)
    with tightfit.load(str(without_t5), precision="fp32", residency="staged", **WAY) as ours:
        result = ours.generate(OBLONG)
        assert not [*replace(OBLONG, prompt="(a:1.5) BREAK b AND c").resolve(ours.spec).prompting.texts][2:]
    assert decibels(result.images[0], reference(alone, OBLONG)) >= 75
    assert decibels(result.images[0], reference(pipe, OBLONG)) < 40
    check_predicted(result)


def test_who_deletes_t5_is_told_how_to_paint_without(sd3, tmp_path):
    shutil.copytree(sd3, folder := tmp_path / "sd3", ignore=shutil.ignore_patterns("*_3"))
    with pytest.raises(TightfitError, match=r"say \[null, null\] of text_encoder_3 and tokenizer_3"):
        tightfit.inspect(str(folder))
    index = json.loads((folder / "model_index.json").read_text())
    nothing = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index | nothing))
    assert tightfit.inspect(str(folder)).family == "sd3-without-t5"


def test_an_export_without_t5_stays_without(without_t5, tmp_path):
    exported = tightfit.inspect(str(tightfit.export_model(str(without_t5), tmp_path / "int8", "int8")))
    assert (exported.family, len(exported.text_encoders)) == ("sd3-without-t5", 2)


def test_clip_skip_is_of_clip_alone(sd3, pipe, decibels):
    """A1111 counts from the last layer, diffusers from the last but one."""
    request = replace(CASES["oblong"], num_inference_steps=1, guidance_scale=1.0, clip_skip=3)
    with tightfit.load(str(sd3), precision="fp32", residency="staged", **WAY) as ours:
        image = ours.generate(request).images[0]
    assert decibels(image, reference(pipe, request, clip_skip=1)) >= 75
    assert decibels(image, reference(pipe, request)) < 60
    for count, is_said in ((1, False), (2, True), (3, False)):
        notices = replace(request, clip_skip=count).resolve(tightfit.inspect(str(sd3))).notices()
        assert any(f"--clip-skip {count} changes nothing" in one for one in notices) == is_said


def test_painting_over_is_diffusers(sd3, pipe, check_painted_over, opened, monkeypatch):
    """But for the shift of latents, which diffusers' pipeline forgets before it decodes them."""
    theirs = opened("StableDiffusion3InpaintPipeline", **pipe.components)
    decode, shift = theirs.vae.decode, theirs.vae.config.shift_factor
    monkeypatch.setattr(theirs.vae, "decode", lambda latents, **given: decode(latents + shift, **given))
    check_painted_over(sd3, OBLONG, lambda request, **given: reference(theirs, request, **given))


@pytest.mark.parametrize("steps", [1, 28])
def test_noise_levels_are_the_schedulers(sd3, pipe, steps):
    pipe.scheduler.set_timesteps(steps)
    spec = tightfit.inspect(str(sd3))
    ours = schedulers.make(schedulers.default(spec), spec, steps, size=(64, 64))
    assert torch.equal(ours.sigmas, pipe.scheduler.sigmas)
    assert torch.equal(ours.timesteps, pipe.scheduler.timesteps)


def test_t5_in_fp16_is_as_in_fp32(sd3):
    """Where transformers' overflows, unless its last weights are in fp32."""
    from transformers import T5EncoderModel

    component = tightfit.inspect(str(sd3)).text_encoders[2]
    ours = component.network.build(component).eval()
    weights = load_file(sd3 / "text_encoder_3" / "model.safetensors")
    loud = {name: value * 1e5 if ".wo." in name else value for name, value in weights.items()}
    theirs = T5EncoderModel.from_pretrained(sd3 / "text_encoder_3").eval()
    for model in (ours, theirs):
        model.load_state_dict(loud, strict=False)
    tokens = torch.tensor([[40, 41, 42, 1, ~0, ~0]])
    with torch.inference_mode():
        wanted = theirs(tokens.clamp(min=0)).last_hidden_state
        assert torch.equal(ours(tokens), wanted)
        torch.testing.assert_close(ours.half()(tokens).float(), wanted, atol=0.02, rtol=0.02)
        overflown = theirs.half()(tokens.clamp(min=0)).last_hidden_state.float()
    assert not torch.allclose(overflown, wanted, atol=0.2, rtol=0.2)


@pytest.fixture(scope="module")
def int4(sd3, made_once):
    return made_once("models/sd3-int4", lambda folder: tightfit.export_model(str(sd3), folder, "int4"))


def test_an_export_streams(int4, check_predicted):
    """What all tokens are scaled by, both ends and tables of tokens stay int8."""
    spec = tightfit.inspect(str(int4))
    formats = spec.denoiser.formats | spec.text_encoders[2].formats
    wide = {name for name, form in formats.items() if form == "int8"}
    assert {
        "pos_embed.proj",
        "transformer_blocks.1.norm1_context.linear",
        "norm_out.linear",
        "shared",
    } <= wide
    block, layer = "transformer_blocks.0", "encoder.block.1.layer"
    few = (
        f"{block}.attn2.to_q",
        f"{block}.ff.net.2",
        f"{layer}.0.SelfAttention.q",
        f"{layer}.1.DenseReluDense.wo",
    )
    assert {formats[name] for name in few} == {"int4-g64"}
    assert {"position_embedding" in name for name in spec.text_encoders[0].formats} == {False}
    images = {}
    for residency in ("resident", "streamed"):
        with tightfit.load(str(int4), residency=residency, **WAY | {"tiling": "tiled"}) as ours:
            if residency == "resident":
                ours.generate(OBLONG)  # what stays is loaded
            result = ours.generate(OBLONG)
        check_predicted(result)
        images[residency] = result.images[0].tobytes()
    assert images["resident"] == images["streamed"]


def test_what_another_precision_takes_is_known(sd3, check_predicted):
    with tightfit.load(str(sd3), precision="bf16", residency="streamed", cfg="sequential", **WAY) as ours:
        check_predicted(ours.generate(replace(OBLONG, num_inference_steps=1)))


def test_pictures_of_one_call_share_places(sd3, monkeypatch, check_predicted):
    monkeypatch.setattr(choose, "WIDER", 0.0)  # however fast it is predicted to be
    way = {**WAY, "precision": "fp32", "residency": "staged", "cfg": "batched"}
    asked = replace(OBLONG, skip_guidance_layers=[1], skip_layer_guidance_stop=1.0)
    with tightfit.load(str(sd3), images_per_call=2, **way) as ours:
        together = ours.generate(replace(asked, num_images=2))
        assert together.plan.images_per_call == 2
        check_predicted(together)
        second = ours.generate(replace(asked, seed=OBLONG.seed + 1)).images[0]
    assert np.abs(np.asarray(together.images[1], int) - np.asarray(second, int)).max() <= 1


def test_texts_stream_beside_a_denoiser_that_fits(sd3, check_predicted):
    """T5 takes the most, as it does of the published model."""
    machine, spec = replace(profile("cpu-8gb"), context_bytes=0, read=1e8), tightfit.inspect(str(sd3))
    wishes = tightfit.Wishes(precision="fp32", attention="sdpa", tiling="whole", cfg="batched")
    staged = tightfit.plan(machine, spec, OBLONG, replace(wishes, residency="staged"))[0].predicted.stages
    assert staged["denoise"] < 0.9 * staged["encode"]
    budget = round(0.99 * staged["encode"])
    best, *_ = tightfit.plan(machine, spec, OBLONG, replace(wishes, budget=budget))
    assert best.residency == "staged, texts streamed"
    assert best.predicted.stages["denoise"] == staged["denoise"]
    assert 0.9 * budget < best.predicted.stages["encode"] <= budget
    assert best.placements["text_encoder_3"].kept_bytes
    with Pipeline(spec, machine, replace(wishes, budget=budget)) as ours:
        result = ours.generate(OBLONG)
    assert result.plan.placements == best.placements
    check_predicted(result)


def test_fp16_is_taken_where_there_is_no_bf16(sd3):
    spec = tightfit.inspect(str(sd3))
    assert [computes(profile(name), spec)[0] for name in ("rtx-3060-12gb", "rtx-2060")] == ["bf16", "fp16"]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"width": 72}, "not a multiple of 16"),
        ({"width": 400}, "pictures up to 384 pixels a side, not 400x96"),
        ({"scheduler": "ddim"}, "trained by flow matching"),
        ({"skip_guidance_layers": "2,3"}, "has layers 0 to 2, no 3"),
        ({"skip_guidance_layers": "7;8"}, "must be numbers of layers such as 7,8,9, not '7;8'"),
        ({"skip_guidance_layers": [1, 7.5]}, r"must be numbers of layers such as 7,8,9, not \[1, 7.5\]"),
        ({"skip_guidance_layers": "1", "guidance_scale": 1.0}, "skip_guidance_layers changes nothing where"),
        ({"skip_layer_guidance_scale": 3.0}, "skip_layer_guidance_scale changes nothing without layers"),
    ],
)
def test_what_it_does_not_do_is_refused(sd3, asked, why):
    with tightfit.load(str(sd3), **WAY) as ours, pytest.raises(TightfitError, match=why):
        ours.plans(replace(OBLONG, **asked))


@pytest.mark.parametrize(
    ("file", "changes", "why"),
    [
        ("transformer/config.json", {"joint_attention_dim": 96}, "files of different models were mixed"),
        ("transformer/config.json", {"pos_embed_max_size": 23}, "not of one width"),
        ("text_encoder/config.json", {"projection_dim": 16}, "files of different models were mixed"),
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "no projection"),
        ("text_encoder_3/config.json", {"feed_forward_proj": "relu"}, "impossible feed_forward_proj"),
        ("text_encoder_3/config.json", {"relative_attention_max_distance": 8}, "impossible relative_att"),
        ("vae/config.json", {"_class_name": "AutoencoderKLFlux2"}, r"not SD 3\.5's AutoencoderKL"),
    ],
)
def test_other_models_are_refused(sd3, tmp_path, file, changes, why):
    mixed = tmp_path / "mixed"
    shutil.copytree(sd3, mixed)
    file = mixed / file
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(TightfitError, match=why):
        tightfit.inspect(str(mixed))
