"""Checkpoints in one file: written here from diffusers folders by a mapping of the test's own, they have
diffusers' tensors by its own converters, and paint what their folders paint."""

from __future__ import annotations

import json
import re
import struct
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tightfit
import torch
from safetensors.torch import load_file, save_file
from tightfit.runtime.adapters import adapted, prediction
from tightfit.runtime.adapters.vae import Vae
from tightfit.runtime.backends.torch import loading
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models import schedulers, vocabulary
from tightfit.runtime.models.layouts import foreign, renames
from tightfit.runtime.models.layouts.safetensors import read_header
from tightfit.runtime.models.layouts.scales import scaled
from tightfit.runtime.models.layouts.single_file import SingleFileLayout
from tightfit.runtime.models.tokens import tokenize

FAMILIES = ("sd1", "sd2", "sdxl")
SIZE = {"width": 32, "height": 32, "num_inference_steps": 2, "seed": 3}
ONE_WAY = {"residency": "staged", "attention": "sdpa", "tiling": "whole"}  # so that little is planned

# -------------------------------------------------------------------------- what is read


def values(tensor) -> torch.Tensor:
    out = torch.empty(tensor.shape)
    loading.read_into(out, tensor, torch.empty(tensor.stored_bytes, dtype=torch.uint8))
    return out


def by_diffusers(family: str, file: Path, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The file's networks by diffusers' converters."""
    from diffusers.loaders import single_file_utils as theirs
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    state, config = load_file(file), lambda name: json.loads((folder / name / "config.json").read_text())
    made = {
        "unet": theirs.convert_ldm_unet_checkpoint(state, config("unet")),
        "vae": theirs.convert_ldm_vae_checkpoint(state, config("vae")),
    }
    if family != "sd2":
        made["text_encoder"] = theirs.convert_ldm_clip_checkpoint(state)
    for name, start in (("text_encoder", "cond_stage_model.model."),
                        ("text_encoder_2", "conditioner.embedders.1.model.")):  # fmt: skip
        if any(key.startswith(start) for key in state):
            model = CLIPTextModelWithProjection(CLIPTextConfig(**config(name)))
            made[name] = theirs.convert_open_clip_checkpoint(model, state, prefix=start)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_of_diffusers_converters(family, files, folders):
    source = SingleFileLayout().read(files[family])
    theirs = by_diffusers(family, files[family], folders[family])
    assert source.listed.keys() == theirs.keys()
    for name, tensors in theirs.items():
        ours = source.networks[name]
        if (family, name) == ("sd2", "text_encoder"):  # which is not used, and left out where it is read
            ours = {key: t for key, t in ours.items() if ".23." not in key and "projection" not in key}
        assert ours.keys() == tensors.keys(), name
        folder = load_file(next((folders[family] / name).glob("*.safetensors")))
        for key, tensor in tensors.items():
            assert torch.equal(values(ours[key]), tensor), key
            assert torch.equal(tensor, folder[key]), key


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_and_plans_are_those_of_the_folder(family, files, folders):
    runs = {}
    for model in (folders[family], files[family]):
        with tightfit.load(str(model), device="cpu", precision="fp32", **ONE_WAY) as pipeline:
            result = pipeline.generate(tightfit.Request("a cat, (sitting)", **SIZE))
        runs[model] = np.asarray(result.images[0]), result.plan.predicted, pipeline.spec
    (one, predicted, spec), (other, as_predicted, single) = runs.values()
    assert (one == other).all()
    assert (predicted.stages, predicted.seconds) == (as_predicted.stages, as_predicted.seconds)
    assert (
        (spec.family, spec.force_zeros) == (single.family, single.force_zeros) == (family, family == "sdxl")
    )
    assert schedulers.default(spec) == schedulers.default(single)
    assert spec.scheduler.items() <= single.scheduler.items()
    for name, component in single.components.items():
        assert component.stored_bytes == spec.components[name].stored_bytes, name


def test_pictures_are_those_that_diffusers_paints_of_the_file(files, folders):
    """Others by way of the folder's, which test_pipeline.py has beside diffusers'."""
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_single_file(
        files["sdxl"], config=str(folders["sdxl"]), local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    size = {name: value for name, value in SIZE.items() if name != "seed"}
    theirs = pipe(
        "a cat", guidance_scale=6.0, output_type="np", generator=torch.Generator().manual_seed(3), **size
    )
    request = tightfit.Request("a cat", guidance_scale=6.0, **SIZE)
    with tightfit.load(str(files["sdxl"]), device="cpu", precision="fp32", **ONE_WAY) as pipeline:
        ours = pipeline.generate(request)
    assert (np.asarray(ours.images[0]) == (theirs.images[0] * 255).round().astype(np.uint8)).all()


def painted(model: Path, **wishes):
    with tightfit.load(str(model), device="cpu", **(ONE_WAY | wishes)) as pipeline:
        return pipeline.generate(tightfit.Request("a cat", **SIZE))


def test_weights_are_quantised_as_the_folders_are(files, folders):
    one, other = (painted(model["sdxl"], precision="int8", compute="fp32") for model in (folders, files))
    assert (np.asarray(one.images[0]) == np.asarray(other.images[0])).all()
    assert one.plan.predicted.stages == other.plan.predicted.stages


def test_an_export_is_the_folders(files, folders, tmp_path):
    """In the same 4 bits, whatever is renamed, sliced and transposed; it paints what the folder's paints."""
    made = [
        tightfit.export_model(model["sdxl"], tmp_path / str(n), "int4")
        for n, model in enumerate((files, folders))
    ]
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        one, other = (load_file(next((folder / part).glob("*.safetensors"))) for folder in made)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), part
    pictures = [np.asarray(painted(folder).images[0]) for folder in made]
    assert (pictures[0] == pictures[1]).all()


def test_fp8_is_exported_as_what_it_stands_for(files, tmp_path):
    stored, plain = in_fp8(load_file(files["sd1"]), torch.float8_e4m3fn, True)
    made = []
    for name, state in (("fp8", stored), ("fp32", plain)):
        save_file(state, tmp_path / f"{name}.safetensors")
        made.append(tightfit.export_model(tmp_path / f"{name}.safetensors", tmp_path / name, "int8"))
    one, other = (load_file(folder / "unet/diffusion_pytorch_model.safetensors") for folder in made)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def in_fp8(state, dtype: torch.dtype, scaled: bool) -> tuple[dict, dict]:
    """The U-Net's matrices in fp8, with a scale beside each or without; and what these are in fp32."""
    stored, plain = dict(state), dict(state)
    for name, tensor in state.items():
        if "diffusion_model" in name and tensor.ndim == 2:
            scale = tensor.abs().max() / 8 if scaled else torch.ones(())
            stored[name] = (tensor / scale).to(dtype)
            plain[name] = stored[name].float() * scale
            if scaled:
                stored[f"{name.removesuffix('.weight')}.scale_weight"] = scale[None]
    return stored, plain


@pytest.mark.parametrize(
    ("dtype", "scaled", "precision", "residency"),
    [
        (torch.float8_e4m3fn, False, "int8", "staged"),
        (torch.float8_e4m3fn, True, "fp32", "streamed"),
        (torch.float8_e5m2, False, "fp32", "staged"),
    ],
)
def test_fp8_is_read_as_what_it_stands_for(dtype, scaled, precision, residency, files, tmp_path):
    stored, plain = in_fp8(load_file(files["sd1"]), dtype, scaled)
    save_file(stored, tmp_path / "fp8.safetensors")
    save_file(plain, tmp_path / "fp32.safetensors")
    one, other = (
        painted(tmp_path / f"{name}.safetensors", precision=precision, compute="fp32", residency=residency)
        for name in ("fp8", "fp32")
    )
    assert (np.asarray(one.images[0]) == np.asarray(other.images[0])).all()
    for stage, predicted in one.plan.predicted.stages.items():
        assert abs(one.stages[stage].peak_bytes - predicted) <= 0.05 * predicted, stage


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_stored(dtype, files, folders, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in load_file(files["sdxl"]).items()}
    save_file(state, tmp_path / "half.safetensors")
    source = SingleFileLayout().read(tmp_path / "half.safetensors")
    for name, tensors in source.networks.items():
        folder = load_file(next((folders["sdxl"] / name).glob("*.safetensors")))
        assert all(torch.equal(values(tensors[key]), folder[key].to(dtype).float()) for key in folder)


def test_text_encoders_under_transformers_names(files, folders, tmp_path):
    """As some tools save SDXL's second, and SD 1.x's before transformers gave them a prefix."""
    state = {n: t for n, t in load_file(files["sdxl"]).items() if "embedders.1" not in n}
    second = load_file(folders["sdxl"] / "text_encoder_2/model.safetensors")
    state |= {f"conditioner.embedders.1.transformer.{name}": tensor for name, tensor in second.items()}
    state = {name.replace("embedders.0.transformer.text_model.", "embedders.0.transformer."): tensor
             for name, tensor in state.items()}  # fmt: skip
    save_file(state, tmp_path / "model.safetensors")
    one, other = (
        SingleFileLayout().read(f).networks for f in (files["sdxl"], tmp_path / "model.safetensors")
    )
    for name in ("text_encoder", "text_encoder_2"):
        assert one[name].keys() == other[name].keys()
        assert all(torch.equal(values(one[name][key]), values(other[name][key])) for key in one[name])


def test_the_refiner_has_one_text_encoder(refiner_twice):
    """OpenCLIP's, where other files of SDXL have CLIP's; and it reads five numbers about a picture."""
    spec, single = (tightfit.inspect(str(path)) for path in refiner_twice)
    assert spec.family == single.family == "sdxl-refiner"
    assert single.force_zeros == spec.force_zeros is False
    assert single.components.keys() == spec.components.keys()
    assert single.unet["addition_time_embed_dim"] == spec.unet["addition_time_embed_dim"] == 8
    for name, component in single.components.items():
        for key, tensor in spec.components[name].tensors.items():
            assert torch.equal(values(component.tensors[key]), values(tensor)), key


# -------------------------------------------------------------------------- what it was trained for


def retold(file: Path, target: Path, keys=(), metadata=None) -> Path:
    save_file(load_file(file) | {key: torch.zeros(0) for key in keys}, target, metadata)
    return target


def test_v_prediction_and_zero_snr_by_keys(files, tmp_path):
    spec = tightfit.inspect(str(files["sdxl"]))
    assert (spec.scheduler["prediction_type"], spec.notes) == ("epsilon", ())
    spec = tightfit.inspect(str(retold(files["sdxl"], tmp_path / "noob.safetensors", ("v_pred", "ztsnr"))))
    assert spec.scheduler["prediction_type"] == "v_prediction"
    assert spec.scheduler["rescale_betas_zero_snr"] is True
    assert spec.notes == (
        "noob.safetensors predicts v_prediction, as its key v_pred says, "
        "without signal at the last noise level (zero terminal SNR)",
    )
    assert schedulers.make("euler", spec, 4).config.rescale_betas_zero_snr is True


@pytest.mark.parametrize(
    ("told", "prediction"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ({"modelspec.prediction_type": "?"}, "v_prediction"),
        ('model:\n  params:\n    parameterization: "v"  # as trained\n', "v_prediction"),
        ("    parameterization: eps\r\n", "epsilon"),
        ("\n" * 60_000 + "parameterization: eps", "epsilon"),  # in time that grows with its length, no faster
        ("        target: sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling\n", "epsilon"),
        ("    target: a.VScaling\n", "v_prediction"),
        ("# parameterization: eps\n", "v_prediction"),
    ],
)
def test_v_prediction_by_metadata_or_the_config_beside_it(told, prediction, files, tmp_path):
    """SD 2.x, of which half predicts noise and half v; diffusers takes v where nothing is said."""
    file = retold(files["sd2"], tmp_path / "m.safetensors", metadata=told if isinstance(told, dict) else None)
    if isinstance(told, str):
        (tmp_path / "m.yaml").write_text(told)
    spec = tightfit.inspect(str(file))
    assert spec.scheduler["prediction_type"] == prediction
    assert spec.native_size == ((128, 128) if prediction == "epsilon" else (192, 192))  # two pixels a latent
    assert prediction in spec.notes[0]
    assert ("does not say" in spec.notes[0]) == (
        told in ({"modelspec.prediction_type": "?"}, "# parameterization: eps\n")
    )


def test_v_prediction_by_the_option(files, tmp_path):
    """--prediction does what a .yaml beside the file does, which diffusers' converters read too."""
    file = retold(files["sd2"], tmp_path / "m.safetensors")
    adapter = prediction.written("eps")
    taken = adapted(tightfit.inspect(str(file)), (adapter,))
    (tmp_path / "m.yaml").write_text("    parameterization: eps\n")
    told = tightfit.inspect(str(file))
    assert (taken.scheduler, taken.native_size, taken.unet) == (told.scheduler, told.native_size, told.unet)
    with tightfit.load(str(file), device="cpu", precision="fp32", **ONE_WAY) as pipeline:
        first, second, third = (
            np.asarray(pipeline.generate(tightfit.Request("a cat", **SIZE, adapters=adapters)).images[0])
            for adapters in ((), (adapter,), (prediction.written("V"),))
        )
    assert np.array_equal(first, second)  # as the .yaml says
    assert not np.array_equal(first, third)
    assert adapted(told, (prediction.written("V"),)).native_size == (192, 192)


def test_what_nothing_predicts():
    with pytest.raises(TightfitError, match="epsilon or v, not 'x0': say --prediction v"):
        prediction.written("x0")


@pytest.mark.parametrize("start", ["first_stage_model.", ""])
def test_a_vae_by_its_original_names_replaces_another(start, files, folders, tmp_path):
    """As VAEs are published beside checkpoints; a whole checkpoint has one, too."""
    state = load_file(files["sd1"])
    if not start:
        inside = "first_stage_model."
        state = {n.removeprefix(inside): t for n, t in state.items() if n.startswith(inside)}
    save_file(state, tmp_path / "vae.safetensors")
    decoder = Vae(tmp_path / "vae.safetensors").apply(tightfit.inspect(str(folders["sd2"]))).decoder
    folder = load_file(folders["sd1"] / "vae/diffusion_pytorch_model.safetensors")
    expected = {name: t for name, t in folder.items() if name.startswith(("decoder.", "post_quant_conv."))}
    assert decoder.tensors.keys() == expected.keys()
    assert all(torch.equal(values(decoder.tensors[name]), expected[name]) for name in expected)


# -------------------------------------------------------------------------- what is refused


def refused(file: Path, *words: str) -> None:
    with pytest.raises(TightfitError) as error:
        tightfit.inspect(str(file))
    assert "\n" not in str(error.value)
    for word in (str(file), *words):
        assert word in str(error.value)


JOINED, ATTENTION = "transformer.resblocks.0.attn.in_proj_weight", "decoder.mid.attn_1.q.weight"


@pytest.mark.parametrize(
    ("rename", "name", "tensor"),
    [
        (renames.open_clip, JOINED, torch.zeros(())),
        (renames.open_clip, JOINED, torch.zeros(5, 3)),
        (renames.vae, ATTENTION, torch.zeros(4, 4, 3, 3)),
        (scaled, "to_q.scale_weight", torch.ones((), dtype=torch.int64)),
        (scaled, "to_q.scale_weight", torch.ones(2)),
    ],
)
def test_tensors_whose_bytes_are_not_what_their_names_say(rename, name, tensor, tmp_path):
    save_file({name: tensor, "to_q.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(
        TightfitError, match=r"a\.safetensors has .*: (copy or download it again|take the fp16)"
    ):
        rename(read_header(tmp_path / "a.safetensors"))


def test_layers_of_many_digits(files, tmp_path):
    name = f"cond_stage_model.transformer.text_model.encoder.layers.{'9' * 5000}.mlp.fc1.bias"
    state = load_file(files["sd1"]) | {name: torch.zeros(2)}
    save_file(state, tmp_path / "a.safetensors")
    assert (
        tightfit.inspect(str(tmp_path / "a.safetensors")).family == tightfit.inspect(str(files["sd1"])).family
    )


NAMES = {
    "model.diffusion_model.input_blocks.1.0.time_stack.emb_layers.1.bias": "Stable Video Diffusion",
    "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": "SD 3",
    "double_blocks.0.img_attn.norm.key_norm.scale": "a part of Flux's transformer",
    "model.diffusion_model.distilled_guidance_layer.in_proj.bias": "Chroma",
    "model.layers.0.self_attn.q_proj.weight": "a language model",
    "double_layers.0.attn.w2q.weight": "AuraFlow",
    "model.diffusion_model.layers.1.adaLN_modulation.0.weight": "a part of Z-Image's transformer",
    "cap_embedder.0.weight": "Lumina 2",
    "clip_txt_mapper.weight": "Stable Cascade",
    "down_blocks.1.0.channelwise.0.weight": "Stable Cascade",
    "model.diffusion_model.transformer_blocks.0.img_mod.1.weight": "Qwen-Image",
    "model.diffusion_model.head.modulation": "Wan",
    "edm_mean": "Playground",
    "lora_unet_x.lora_down.weight": "a LoRA",
    "unet.down_blocks.0.attentions.0.to_q.lora_A.weight": "a LoRA",
    "decoder.conv_in.weight": "a VAE alone",
    "decoder.mid.attn_1.k.weight": "a VAE alone",
    "control_model.input_blocks.0.0.weight": "a ControlNet",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet",
    "emb_params": "an embedding",
    "clip_g": "an embedding",
    "text_model.encoder.layers.0.mlp.fc1.weight": "a text encoder alone",
    "input_blocks.0.0.weight": "a U-Net alone",
    "down_blocks.0.resnets.0.conv1.weight": "a U-Net alone",
    "params": "of no model that tightfit knows",
}


@pytest.mark.parametrize("name", NAMES)
def test_other_files_are_named_for_what_they_are(name, tmp_path):
    save_file({name: torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", NAMES[name])


def test_flux_is_not_taken_for_chroma():
    with pytest.raises(TightfitError, match="is Chroma"):
        foreign.check(
            Path("x"), ["double_blocks.0.img_attn.qkv.bias", "distilled_guidance_layer.norms.0.scale"]
        )


@pytest.mark.parametrize(
    ("start", "word"),
    [("cond_stage_model", "text encoder"), ("model.diffusion_model", "U-Net")],
)
def test_a_network_that_is_missing(start, word, files, tmp_path):
    state = {name: t for name, t in load_file(files["sd1"]).items() if not name.startswith(start)}
    save_file(state, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", f"without a {word}", "take a checkpoint that has all networks")


def test_a_unet_alone_says_how_it_is_given(files, tmp_path):
    start = "model.diffusion_model."
    state = {name: t for name, t in load_file(files["sd1"]).items() if name.startswith(start)}
    for name, some in {"a": state, "b": {n.removeprefix(start): t for n, t in state.items()}}.items():
        save_file(some, tmp_path / f"{name}.safetensors")
        refused(tmp_path / f"{name}.safetensors", "--model MODEL --unet FILE")


def test_a_vae_beside_a_checkpoint_without(files, folders, tmp_path):
    state = load_file(files["sd1"])
    inside = "first_stage_model."
    save_file({n: t for n, t in state.items() if not n.startswith(inside)}, tmp_path / "x.safetensors")
    save_file({n: t for n, t in state.items() if n.startswith(inside)}, tmp_path / "vae.safetensors")
    request = tightfit.Request("a cat", **SIZE)
    with (
        pytest.raises(TightfitError, match=r"x\.safetensors is a single file without a VAE: .* --vae"),
        tightfit.load(str(tmp_path / "x.safetensors"), device="cpu") as pipeline,
    ):
        pipeline.generate(request)
    with pytest.raises(TightfitError, match="without a VAE: name one by --vae"):
        tightfit.export_model(tmp_path / "x.safetensors", tmp_path / "made", "int8")
    named = [Vae(tmp_path / "vae.safetensors")]
    made = tightfit.export_model(tmp_path / "x.safetensors", tmp_path / "made", "int8", adapters=named)
    (stored,) = map(load_file, (made / "vae").glob("*.safetensors"))
    assert {name.partition(".")[0] for name in stored} >= {"encoder", "decoder"}  # both halves
    assert tightfit.inspect(str(made)).decoder.tensors
    whole = np.asarray(painted(files["sd1"], precision="fp32").images[0])
    for vae in (tmp_path / "vae.safetensors", folders["sd1"] / "vae"):
        beside = painted(tmp_path / "x.safetensors", precision="fp32", adapters=[Vae(vae)])
        assert (np.asarray(beside.images[0]) == whole).all()


def with_channels(file: Path, channels: int, target: Path) -> Path:
    state = load_file(file)
    state["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(64, channels, 3, 3)
    save_file(state, target)
    return target


def test_other_inputs_of_the_denoiser(files, tmp_path):
    file = with_channels(files["sd1"], 7, tmp_path / "x.safetensors")
    refused(file, "7 input channels", "text-to-image counterpart")


@pytest.mark.parametrize(
    ("channels", "words"),
    [
        (9, "is an inpainting model: give a picture and a mask to paint in"),
        (8, "is a model that edits pictures: give one, and no mask"),
    ],
)
def test_models_that_read_pictures_want_them(channels, words, files, tmp_path):
    spec = tightfit.inspect(str(with_channels(files["sd1"], channels, tmp_path / "x.safetensors")))
    with pytest.raises(TightfitError, match=words):
        tightfit.Request("a cat").resolve(spec)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"\n<html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(90), "pickle"),
        (b"\x80\x02" + bytes(90), "pickle"),
        (struct.pack("<Q", 1000) + b"{", "not a whole safetensors file"),
    ],
)
def test_what_is_no_safetensors_file(content, word, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(tmp_path / "x.safetensors", word)


def test_a_truncated_checkpoint(files, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(files["sd1"].read_bytes()[:-1])
    refused(tmp_path / "x.safetensors", "truncated")


@pytest.mark.parametrize(
    "gone",
    [
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
        "model.diffusion_model.out.2.weight",
        "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    ],
)
def test_a_checkpoint_that_lacks_a_tensor(gone, files, tmp_path):
    state = load_file(files["sd1"])
    del state[gone]
    save_file(state, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "no whole checkpoint")


# -------------------------------------------------------------------------- CLIP's vocabulary

TEXTS = (
    "a photo of a cat",
    "  Masterpiece,  BEST quality!!! 1girl's (red:1.3) hair_ornament ",
    "naïve café — 12345 déjà vu… ÀÉÎ",
    "猫が座っている 🐈‍⬛ emoji",
    "don't we'll they've I'm you'd he's it're",
    "<|startoftext|> x <|endoftext|>",
    "a\tb\nc \u00a0 d",
    "supercalifragilisticexpialidocious antidisestablishmentarianism " * 3,
    "",
)


def kind(letter: str) -> str:
    """Letters and signs stay together, each digit stands alone."""
    category = unicodedata.category(letter)[0]
    return category if category in "LN" else "space" if letter.isspace() else "sign"


def by_hand(text: str, ids: dict[str, int], ranks: dict[tuple[str, str], int]) -> list[int]:
    """Byte pair encoding as CLIP's paper has it: of all pairs the one that was learned first is merged."""
    letters = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
    letters |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in letters)}
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).lower()
    words, at = [], 0
    ends = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d")
    while at < len(text):
        match, end = ends.match(text, at), at + 1
        while not match and end < len(text) and kind(text[at]) == kind(text[end]) != "N":
            end += 1
        words.append(match[0] if match else text[at:end])
        at += len(words[-1])
    words = [word for word in words if not word.isspace()]
    out = []
    for word in words:
        if word.startswith("<|"):
            out.append(ids[word])
            continue
        parts = [letters[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
            left, right = min(pairs, key=lambda pair: ranks[pair])
            merged, i = [], 0
            while i < len(parts):
                both = parts[i : i + 2] == [left, right]
                merged.append(left + right if both else parts[i])
                i += 1 + both
            parts = merged
        out += [ids[part] for part in parts]
    return [ids[vocabulary.START], *out, ids[vocabulary.END]]


def test_tokens_are_clips(files):
    spec = tightfit.inspect(str(files["sdxl"]))
    first, second = spec.text_encoders
    ids = tokenize(spec, first, {"prompt": "a photo of a cat"}).ids[0]
    assert ids[:8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]  # as OpenAI's own gives them
    assert tokenize(spec, second, {"prompt": "a"}).ids[0][:4].tolist() == [49406, 320, 49407, 0]
    merges = vocabulary.clip_merges()
    known, ranks = vocabulary.vocabulary(merges), {pair: rank for rank, pair in enumerate(merges)}
    assert (len(merges), len(known)) == (48894, 49408)
    for text in TEXTS:
        expected = by_hand(text, known, ranks)
        found = tokenize(spec, first, {"prompt": text}).ids[0].tolist()
        assert found[: len(expected)][:76] == expected[:76], text
