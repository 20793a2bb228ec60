"""ModelSpec: families told apart by their configs, headers read exactly, every broken folder refused with a
cure."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.models.layouts.safetensors import read_header, weight_files
from tightfit.runtime.models.layouts.weights import read_file
from tightfit.runtime.models.tokenizer import read_tokenizer

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

    save_file(
        {f"t{i}": np.zeros(shape, np.float16) for i, shape in enumerate(shapes)}, tmp_path / "x.safetensors"
    )
    read = read_header(tmp_path / "x.safetensors")
    assert {name: t.shape for name, t in read.items()} == {
        f"t{i}": tuple(shape) for i, shape in enumerate(shapes)
    }
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
    refused(sd1_copy, "pickle", f'tightfit convert "{sd1_copy / "unet/diffusion_pytorch_model.bin"}"')
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
    refused(tmp_path / "model.ckpt", "pickle", f'tightfit convert "{tmp_path / "model.ckpt"}"')
    (tmp_path / "only").mkdir()
    (tmp_path / "only/model.ckpt").write_bytes(b"\x80\x04")
    refused(tmp_path / "only", "pickle", f'tightfit convert "{tmp_path / "only/model.ckpt"}"')
    with pytest.raises(TightfitError, match=r'tightfit convert ".*word\.pt"'):  # an embedding or a VAE
        read_header(tmp_path / "word.pt")


def test_files_that_are_no_models(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "x.gguf", "broken GGUF header", "copy or download it again")
    refused(tmp_path, "name one of them", f"such as {tmp_path / 'x.gguf'}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path, "name one of them", f"such as {tmp_path / 'model.safetensors'}")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "is no model")


def test_a_name_like_another(sd1_copy, tmp_path):
    refused(tmp_path / "mode", f"did you mean {sd1_copy}?")
    refused(Path("emojis"), "did you mean emoji?")


def test_a_name_is_no_command(tmp_path):
    """A folder's name never becomes part of the command that is to be typed if a shell would run it."""
    evil = tmp_path / "$(touch x)'\"; x.ckpt"
    evil.write_bytes(b"")
    refused(evil, 'tightfit convert "MODEL"')


def test_other_models_are_refused(sd1_copy):
    edit(sd1_copy / "unet/config.json", in_channels=7)
    refused(sd1_copy, "unknown kind of model")
    edit(sd1_copy / "unet/config.json", in_channels=4, _class_name="FluxTransformer2DModel")
    refused(sd1_copy, "FluxTransformer2DModel", "SDXL")
    edit(sd1_copy / "unet/config.json", _class_name="UNet2DConditionModel")
    edit(sd1_copy / "vae/config.json", out_channels=6)
    refused(sd1_copy, "red, green and blue")
    edit(sd1_copy / "vae/config.json", out_channels=3)
    edit(sd1_copy / "model_index.json", unet=[None, None])
    refused(sd1_copy, "without a unet")


def test_texts_of_another_width_are_refused(tiny_models, sd1_copy):
    """SD 2's text encoder before SD 1's U-Net, say."""
    config = sd1_copy / "text_encoder/config.json"
    width = json.loads(config.read_text())["hidden_size"]
    edit(config, hidden_size=2 * width)
    refused(
        sd1_copy,
        f"texts {2 * width} wide",
        f"{width} wide in its U-Net",
        "files of different models were mixed",
    )


def test_broken_configs(sd1_copy):
    (sd1_copy / "unet/config.json").write_text("{")
    refused(sd1_copy, "not valid JSON")
    (sd1_copy / "unet/config.json").write_text("[" * 100_000)
    refused(sd1_copy, "not valid JSON")
    (sd1_copy / "unet/config.json").write_text("[]")
    refused(sd1_copy, "not a JSON object")
    (sd1_copy / "unet/config.json").write_text("{}")
    refused(sd1_copy, "made of None")


def test_shards_and_variants(sd1_copy):
    folder = sd1_copy / "unet"
    whole = folder / "diffusion_pytorch_model.safetensors"
    whole.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert [f.name for f in weight_files(folder)] == ["diffusion_pytorch_model.fp16.safetensors"]
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}})
    )
    # The shards are not there.
    assert [f.name for f in weight_files(folder)] == ["diffusion_pytorch_model.fp16.safetensors"]
    inspect(sd1_copy)
    for shard in ("one", "two"):
        (folder / f"{shard}.safetensors").touch()
    assert [f.name for f in weight_files(folder)] == ["one.safetensors", "two.safetensors"]
    for places in ({"a": "../../../etc/passwd"}, {"a": "x" * 300}, ["x"], {}, None):
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(TightfitError, match="plain file names"):
            weight_files(folder)


def test_an_index_is_of_the_files_that_it_lists(tmp_path):
    """Whatever it is called, and whatever lies beside it."""
    for name in ("diffusion_pytorch_model", "mine"):
        save_file({name: np.zeros(1)}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "mine.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"mine": "mine.safetensors"}}))
    assert [*read_file(index)[0]] == ["mine"]


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet", {"sample_size": [8, 8, 8]}),
        ("unet", {"sample_size": True}),
        ("unet", {"block_out_channels": "x"}),
        ("unet", {"block_out_channels": [32] * 1000}),
        ("unet", {"in_channels": 4.0}),
        ("unet", {"norm_num_groups": True}),
        ("unet", {"norm_eps": "1e-5"}),
        ("unet", {"norm_eps": 0}),
        ("unet", {"downsample_padding": 10**9}),
        ("unet", {"down_block_types": ["DownBlock2D", 3]}),
        ("unet", {"layers_per_block": 10**6}),
        ("unet", {"layers_per_block": [2, 2, 2, 10**9]}),
        ("unet", {"layers_per_block": -1}),
        ("unet", {"transformer_layers_per_block": 10**9}),
        ("unet", {"transformer_layers_per_block": [1, [1, 10**7], 1, 1]}),
        ("unet", {"reverse_transformer_layers_per_block": 10**8}),
        ("unet", {"cross_attention_dim": []}),
        ("unet", {"use_linear_projection": "yes"}),
        ("unet", {"time_cond_proj_dim": 0.5}),
        ("vae", {"scaling_factor": "x"}),
        ("vae", {"scaling_factor": True}),
        ("vae", {"scaling_factor": float("inf")}),
        ("vae", {"scaling_factor": float("nan")}),
        ("vae", {"scaling_factor": 0}),
        ("vae", {"latents_mean": [0.0, float("nan"), 0, 0]}),
        ("vae", {"latents_std": 1.0}),
        ("vae", {"block_out_channels": []}),
        ("vae", {"layers_per_block": 10**9}),
        ("vae", {"norm_num_groups": "8"}),
        ("text_encoder", {"max_position_embeddings": None}),
        ("text_encoder", {"num_hidden_layers": 10**9}),
        ("text_encoder", {"num_hidden_layers": 0}),
        ("text_encoder", {"layer_norm_eps": "x"}),
        ("text_encoder", {"eos_token_id": [1]}),
        ("text_encoder", {"eos_token_id": None}),
        ("text_encoder", {"architectures": 3}),
        ("text_encoder", {"architectures": True}),
        ("text_encoder", {"architectures": [None]}),
        ("scheduler", {"num_train_timesteps": 10**9}),
        ("scheduler", {"num_train_timesteps": 1000.0}),
        ("scheduler", {"original_inference_steps": 10**9}),
        ("scheduler", {"solver_order": 10**9}),
        ("scheduler", {"prediction_type": "evil"}),
        ("scheduler", {"prediction_type": ["epsilon"]}),
        ("scheduler", {"beta_start": float("inf")}),
        ("scheduler", {"shift": 0}),
        ("scheduler", {"max_shift": "x"}),
    ],
)
def test_impossible_numbers(sd1_copy, file, changes):
    edit(sd1_copy / file / ("scheduler_config.json" if file == "scheduler" else "config.json"), **changes)
    refused(sd1_copy, f"an impossible {next(iter(changes))}, ")


def test_a_number_too_long_to_write(sd1_copy):
    file = sd1_copy / "vae/config.json"
    file.write_text(file.read_text().replace("0.18215", "1e400"))
    refused(sd1_copy, "an impossible scaling_factor, inf")
    file.write_text(file.read_text().replace("1e400", "1" * 400))
    refused(sd1_copy, "vae/config.json", "copy or download it again")


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet", {"layers_per_block": 400}),
        ("unet", {"transformer_layers_per_block": 100}),
        ("unet", {"transformer_layers_per_block": [1, 1, 1, [1, 500]]}),
        ("vae", {"layers_per_block": 200}),
        ("text_encoder", {"num_hidden_layers": 100}),
        ("unet", {"layers_per_block": 100}),
    ],
)
def test_more_layers_than_tensors(sd1_copy, file, changes):
    """Counts that are possible, but not of the weights that are there: nothing is built to find out."""
    edit(sd1_copy / file / "config.json", **changes)
    refused(sd1_copy, next(iter(changes)), "more layers than", "tensors")


def header_of(**shapes):
    """A safetensors file of fp32 tensors of these shapes, all of them empty."""
    entries = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()
    }
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def test_empty_tensors_are_no_layers(sd1_copy):
    """5,000 of them, and a config of 512 layers a block: building these took 108 s and 1.2 GB."""
    (sd1_copy / UNET).write_bytes(header_of(**{f"t{i}": [0] for i in range(5000)}))
    edit(sd1_copy / "unet/config.json", layers_per_block=512)
    refused(sd1_copy, "layers_per_block 512", "more layers than 0 tensors")


def test_tensors_are_counted_over_all_shards(sd1_copy):
    """1,000 files of 100,000 tensors each would fit one file's limit."""
    (sd1_copy / UNET).unlink()
    for shard in range(3):
        names = [f"t{shard}_{i}" for i in range(4000)]
        (sd1_copy / f"unet/{shard}.safetensors").write_bytes(header_of(**{name: [0] for name in names}))
    places = {"weight_map": {str(shard): f"{shard}.safetensors" for shard in range(3)}}
    (sd1_copy / f"{UNET}.index.json").write_text(json.dumps(places))
    refused(sd1_copy, "promises more than 10000 tensors")


def test_a_tensor_in_two_shards(sd1_copy):
    whole = (sd1_copy / UNET).rename(sd1_copy / "unet/a.safetensors")
    name = next(iter(read_header(whole)))
    (sd1_copy / "unet/b.safetensors").write_bytes(header_of(**{name: [0]}))
    (sd1_copy / f"{UNET}.index.json").write_text(
        json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})
    )
    refused(sd1_copy, "b.safetensors holds", "which a.safetensors holds too")


@pytest.mark.parametrize("part", ["unet", "tokenizer"])
def test_a_folder_that_may_not_be_entered(sd1_copy, part, monkeypatch):
    """As os tells it; root, who may enter all, runs these tests in some places."""
    stat = os.stat

    def denied(path, *given, **more):
        if Path(path).parent == sd1_copy / part:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *given, **more)

    monkeypatch.setattr(os, "stat", denied)
    with pytest.raises(TightfitError, match=rf"{part}.* cannot be read \(Permission denied\): allow it"):
        inspect(sd1_copy) if part == "unet" else read_tokenizer(sd1_copy / part)


def test_labels_are_not_made(sd1, sd1_copy):
    """transformers makes a name for each of num_labels."""
    import tightfit

    edit(sd1_copy / "text_encoder/config.json", num_labels=10**9, id2label={"x": 1})
    with (
        tightfit.load(str(sd1_copy), precision="fp32", device="cpu", attention="sdpa") as ours,
        tightfit.load(str(sd1), device="cpu") as theirs,
    ):
        ours("a cat", num_inference_steps=1)
        assert (
            ours.spec.components["text_encoder"].tensors.keys()
            == theirs.spec.components["text_encoder"].tensors.keys()
        )


def test_fields_left_to_the_libraries(sd1, sd1_copy):
    """in_channels, latent_channels and the like are what diffusers takes for them."""
    for file, fields in (
        ("unet", ("in_channels", "out_channels", "layers_per_block")),
        ("vae", ("latent_channels", "out_channels")),
    ):
        config = json.loads((sd1_copy / file / "config.json").read_text())
        (sd1_copy / file / "config.json").write_text(
            json.dumps({k: v for k, v in config.items() if k not in fields})
        )
    spec, whole = inspect(sd1_copy), inspect(sd1)
    for component in whole.components.values():
        sizes = (component, 2, 64, 64)
        assert spec.inputs(*sizes) == whole.inputs(*sizes)


def test_lists_for_the_width_of_texts(sd1, sd1_copy):
    width = inspect(sd1).unet["cross_attention_dim"]
    edit(sd1_copy / "unet/config.json", cross_attention_dim=[width] * 4)
    spec = inspect(sd1_copy)
    assert spec.inputs(spec.components["unet"], 2, 64, 64)["hidden"] == (2, 77, width)
    edit(sd1_copy / "unet/config.json", cross_attention_dim=[width, width, 2 * width, width])
    refused(sd1_copy, f"texts {width} wide", f"{2 * width} wide in its U-Net")


def test_no_size_of_its_own(sd1_copy):
    from tightfit.runtime.request import Request

    edit(sd1_copy / "unet/config.json", sample_size=None)
    spec = inspect(sd1_copy)
    whole = Request("a", width=64, height=72).resolve(spec)
    assert (whole.width, whole.height) == (64, 72)
    for some in (Request("a"), Request("a", width=64)):
        with pytest.raises(
            TightfitError, match=r"unet/config.json has no sample_size: say --width and --height"
        ):
            some.resolve(spec)


@pytest.mark.parametrize(
    ("version", "size", "native"),
    [("0.6.0", 32, 64), ("0.8.1", 8, 64), ("0.9.0", 32, 32), ("0.9.0.dev0", 32, 32), ("0.10.2", 8, 8),
     ("0.6.0", 96, 96), ("0.6.0", [32, 40], None), (None, 32, 32)],
)  # fmt: skip
def test_sizes_that_diffusers_corrects(sd1_copy, version, size, native):
    """Configs of before 0.9 said 32 for pictures of 512; StableDiffusionPipeline takes 64 there, and so do
    we."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    more = {"sample_size": size} | ({"_diffusers_version": version} if version else {})
    config = json.loads((sd1_copy / "unet/config.json").read_text())
    config = {name: value for name, value in config.items() if name != "_diffusers_version"} | more
    (sd1_copy / "unet/config.json").write_text(json.dumps(config))
    spec = inspect(sd1_copy)
    theirs = StableDiffusionPipeline(
        None, None, None, UNet2DConditionModel.from_config(config), None, None, None
    )
    assert theirs.unet.config.sample_size == (native or size)
    assert spec.native_size == ((native * 8, native * 8) if native else (256, 320))
    edit(sd1_copy / "model_index.json", _class_name="LatentConsistencyModelPipeline")
    assert inspect(sd1_copy).native_size == ((size * 8, size * 8) if native else (256, 320))


@pytest.mark.parametrize("defaults", [[], {"guidance_scale": "x"}])
def test_broken_manifest(sd1_copy, defaults):
    (sd1_copy / "tightfit.json").write_text(json.dumps({"defaults": defaults}))
    refused(sd1_copy, "tightfit.json")


def test_oblong_models(sd1_copy):
    edit(sd1_copy / "unet/config.json", sample_size=[8, 12])
    assert inspect(sd1_copy).native_size == (64, 96)
