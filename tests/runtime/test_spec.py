"""ModelSpec: families told apart by their configs, headers read exactly, every broken folder refused with a cure."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.files import read_header, weight_files
from tightfit.runtime.hub import inspect

UNET = "unet/diffusion_pytorch_model.safetensors"


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(("family", "size"), [("sd1", 64), ("sd2", 64), ("sdxl", 64)])
def test_families(tiny_models, family, size):
    spec = inspect(tiny_models[family])
    assert (spec.family, spec.native_size, spec.downsampling) == (family, (size, size), 8)
    assert ("text_encoder_2" in spec.components) == (family == "sdxl")
    assert spec.force_zeros == (family == "sdxl")


def test_weights_counted_as_torch_counts_them(tiny_models):
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    spec = inspect(tiny_models["sdxl"])
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(spec.unet))
        vae = AutoencoderKL.from_config(dict(spec.vae))
    decoder = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    assert spec.components["unet"].stored_bytes == 4 * sum(p.numel() for p in unet.parameters())
    assert spec.components["vae_decoder"].stored_bytes == 4 * sum(p.numel() for p in decoder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(shapes=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=5))
def test_header_agrees_with_the_library(tmp_path, shapes):
    import numpy as np
    from safetensors.numpy import save_file

    save_file({f"t{i}": np.zeros(shape, np.float16) for i, shape in enumerate(shapes)}, tmp_path / "x.safetensors")
    read = read_header(tmp_path / "x.safetensors")
    assert {name: t.shape for name, t in read.items()} == {f"t{i}": tuple(shape) for i, shape in enumerate(shapes)}
    assert {t.dtype for t in read.values()} == {"F16"}


def refused(folder, *words):
    with pytest.raises(TightfitError) as caught:
        inspect(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_missing_pieces(sd1_copy, tmp_path):
    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path, "model_index.json")
    (sd1_copy / "vae/config.json").unlink()
    refused(sd1_copy, "vae/config.json is missing")


def test_truncated_weights(sd1_copy):
    file = sd1_copy / UNET
    file.write_bytes(file.read_bytes()[:-100])
    refused(sd1_copy, UNET, "truncated")
    file.write_bytes(b"\x05")
    refused(sd1_copy, UNET, "not a whole safetensors file")


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"a": 3}', b'{"a": {"dtype": "F32"}}', b"\xff\xfe"])
def test_broken_headers(sd1_copy, header):
    (sd1_copy / UNET).write_bytes(struct.pack("<Q", len(header)) + header)
    refused(sd1_copy, "broken safetensors header")


def test_header_longer_than_file(sd1_copy):
    (sd1_copy / UNET).write_bytes(struct.pack("<Q", 2**62) + b"{}")
    refused(sd1_copy, "not a whole safetensors file")


def test_renamed_weights(sd1_copy):
    (sd1_copy / UNET).rename(sd1_copy / "unet/mine.safetensors")
    refused(sd1_copy, "rename it back", "mine.safetensors")


def test_pickles_are_refused(sd1_copy, tmp_path):
    (sd1_copy / UNET).rename(sd1_copy / "unet/diffusion_pytorch_model.bin")
    refused(sd1_copy, "pickle", "from_single_file")
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
    refused(tmp_path / "model.ckpt", "pickle", "convert")
    (tmp_path / "only").mkdir()
    (tmp_path / "only/model.ckpt").write_bytes(b"\x80\x04")
    refused(tmp_path / "only", "pickle")


def test_single_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path / "model.safetensors", "single file", "from_single_file")


def test_other_models_are_refused(sd1_copy):
    edit(sd1_copy / "unet/config.json", in_channels=9)
    refused(sd1_copy, "inpainting")
    edit(sd1_copy / "unet/config.json", in_channels=4, _class_name="FluxTransformer2DModel")
    refused(sd1_copy, "FluxTransformer2DModel", "SDXL")
    edit(sd1_copy / "unet/config.json", _class_name="UNet2DConditionModel")
    edit(sd1_copy / "vae/config.json", out_channels=6)
    refused(sd1_copy, "red, green and blue")
    edit(sd1_copy / "vae/config.json", out_channels=3)
    edit(sd1_copy / "scheduler/scheduler_config.json", _class_name="EDMDPMSolverMultistepScheduler")
    refused(sd1_copy, "EDMDPMSolverMultistepScheduler")
    edit(sd1_copy / "model_index.json", unet=[None, None])
    refused(sd1_copy, "without a unet")


def test_texts_of_another_width_are_refused(tiny_models, sd1_copy):
    """SD 2's text encoder before SD 1's U-Net, say."""
    config = sd1_copy / "text_encoder/config.json"
    width = json.loads(config.read_text())["hidden_size"]
    edit(config, hidden_size=2 * width)
    refused(sd1_copy, f"texts {2 * width} wide", f"{width} wide in its U-Net", "files of different models were mixed")


def test_broken_configs(sd1_copy):
    (sd1_copy / "unet/config.json").write_text("{")
    refused(sd1_copy, "not valid JSON")
    (sd1_copy / "unet/config.json").write_text("[" * 100_000)
    refused(sd1_copy, "not valid JSON")
    (sd1_copy / "unet/config.json").write_text("[]")
    refused(sd1_copy, "not a JSON object")
    (sd1_copy / "unet/config.json").write_text("{}")
    refused(sd1_copy, "in_channels None", "cannot be")


def test_shards_and_variants(sd1_copy):
    folder = sd1_copy / "unet"
    whole = folder / "diffusion_pytorch_model.safetensors"
    whole.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert [f.name for f in weight_files(folder)] == ["diffusion_pytorch_model.fp16.safetensors"]
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}}))
    assert [f.name for f in weight_files(folder)] == ["one.safetensors", "two.safetensors"]
    for places in ({"a": "../../../etc/passwd"}, ["x"], {}, None):
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(TightfitError, match="plain file names"):
            weight_files(folder)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet", {"sample_size": None}),
        ("unet", {"sample_size": [8, 8, 8]}),
        ("unet", {"block_out_channels": "x"}),
        ("vae", {"scaling_factor": "x"}),
        ("vae", {"block_out_channels": []}),
        ("text_encoder", {"max_position_embeddings": None}),
    ],
)
def test_impossible_numbers(sd1_copy, file, changes):
    edit(sd1_copy / file / "config.json", **changes)
    refused(sd1_copy, next(iter(changes)), "cannot be")


@pytest.mark.parametrize("defaults", [[], {"guidance_scale": "x"}])
def test_broken_manifest(sd1_copy, defaults):
    (sd1_copy / "tightfit.json").write_text(json.dumps({"defaults": defaults}))
    refused(sd1_copy, "tightfit.json")


def test_oblong_models(sd1_copy):
    edit(sd1_copy / "unet/config.json", sample_size=[8, 12])
    assert inspect(sd1_copy).native_size == (64, 96)
