"""Z-Image as ComfyUI has it, in three files, and its LoRAs: what diffusers' own conversions make of them."""

from __future__ import annotations

import functools
import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import tightfit
import torch
from safetensors.torch import save_file
from tightfit.runtime import adapters
from tightfit.runtime.errors import TightfitError

SPLIT = runpy.run_path(str(Path(__file__).with_name("test_split_file.py")))
REQUEST, painted, values = (SPLIT[name] for name in ("REQUEST", "painted", "values"))
NAMES = DENOISER, ENCODER, VAE = "z_image_turbo_bf16.safetensors", "qwen_3_4b.safetensors", "ae.safetensors"
# diffusers' words beside those of Z-Image's own code, which ComfyUI kept.
WORDS = {
    "all_x_embedder.2-1": "x_embedder", "all_final_layer.2-1": "final_layer", "norm_q": "q_norm",
    "norm_k": "k_norm", "to_out.0": "out",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(made_once):
    return made_once("models/z-image-32", functools.partial(SPLIT["write_folder"], family="z-image"))


@pytest.fixture(scope="module")
def parts(folder):
    return SPLIT["parts_of"](folder)


@pytest.fixture(scope="module")
def comfy(folder, parts, made_once):
    def write(models):
        SPLIT["write_comfy"](models, folder, published(parts["transformer"]), NAMES)

    return made_once("comfy/z-image", write)


def published(state) -> dict[str, torch.Tensor]:
    made = {"norm_final.weight": torch.ones(192)}  # which training left there
    for name, tensor in state.items():
        for new, old in WORDS.items():
            name = name.replace(new, old)
        if name.endswith(".to_q.weight"):
            joined = [state[name.replace(".to_q.", f".to_{part}.")] for part in "qkv"]
            made[name.replace(".to_q.", ".qkv.")] = torch.cat(joined)
        elif ".to_" not in name:
            made[name] = tensor
    return made


def converted(state) -> dict[str, torch.Tensor]:
    from diffusers.loaders import single_file_utils

    return single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers(dict(state))


def with_files(folder, **files):
    given = SPLIT["given"](**files)
    return replace(REQUEST, adapters=given).resolve(tightfit.inspect(str(folder))).spec


def test_files_found_beside_are_the_model(comfy, folder, parts):
    made = converted(published(parts["transformer"]))
    assert made.keys() == parts["transformer"].keys()  # the test's mapping is diffusers'
    assert all(torch.equal(made[name], tensor) for name, tensor in parts["transformer"].items())
    spec, other = (tightfit.inspect(str(one)) for one in (comfy / "diffusion_models" / DENOISER, folder))
    for name, component in spec.components.items():
        assert component.tensors.keys() == other.components[name].tensors.keys()
        SPLIT["check_values"](component, parts[component.network.folder])
        known, wanted = (json.loads(json.dumps(one.config)) for one in (component, other.components[name]))
        for key in known.keys() & wanted.keys() - {"max_position_embeddings", "sample_size"}:  # not used
            assert known[key] == wanted[key], key
    assert (spec.default_steps, spec.default_guidance, spec.scheduler["shift"]) == (8, 1.0, 3.0)
    SPLIT["check_same"](painted(comfy / "diffusion_models" / DENOISER), painted(folder))


def test_files_are_named_by_options(comfy, folder, tmp_path):
    alone = tmp_path / "z-image-Q8_0.safetensors"
    alone.write_bytes((comfy / "diffusion_models" / DENOISER).read_bytes())
    spec = tightfit.inspect(str(alone))
    assert (spec.default_steps, spec.default_guidance, spec.scheduler["shift"]) == (50, 5.0, 6.0)  # no Turbo
    with pytest.raises(
        TightfitError, match=r"a Qwen3 64 wide .*--text-encoder FILE; .*16 channels \(ae\.safe.*--vae"
    ):
        REQUEST.resolve(spec)
    named = {"text_encoder": comfy / "text_encoders" / ENCODER, "vae": comfy / "vae" / VAE}
    for model, files in ((alone, named), (folder, named | {"unet": alone})):
        spec = with_files(model, **files)
        assert {component.folder for component in spec.components.values()} == {alone, *named.values()}
        decoder = tightfit.inspect(str(folder)).decoder
        assert spec.decoder.tensors.keys() == decoder.tensors.keys()
        assert spec.latent_affine == tightfit.inspect(str(folder)).latent_affine


def in_fp8(state) -> tuple[dict, dict]:
    """As ComfyUI writes it, with a tensor that says so."""
    stored, meant = SPLIT["in_fp8"](state)
    return stored | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, meant


@pytest.mark.parametrize("written", [SPLIT["in_bf16"], in_fp8])
def test_formats_are_read_as_what_they_stand_for(written, folder, parts, tmp_path):
    stored, meant = written(published(parts["transformer"]))
    file = tmp_path / DENOISER
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in stored.items()}, file)
    SPLIT["check_values"](with_files(folder, unet=file).denoiser, converted(meant))


def squeezed(state) -> dict[str, torch.Tensor]:
    tokens = {name: state[name].squeeze(0) for name in ("x_pad_token", "cap_pad_token")}
    return published(state) | tokens


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_gguf_is_read_as_what_it_stands_for(kind, folder, parts, tmp_path):
    """stable-diffusion.cpp's has the tokens that pad without their side of 1."""
    meant, texts = SPLIT["gguf_files"](parts, tmp_path, kind, squeezed, "lumina2")
    named = {"unet": tmp_path / "denoiser.gguf", "text_encoder": tmp_path / "qwen.gguf"}
    spec = with_files(folder, **named)
    SPLIT["check_values"](spec.denoiser, converted(meant))
    SPLIT["check_values"](spec.text_encoders[0], texts)
    if kind == "Q8_0":
        assert spec.denoiser.tensors["layers.1.attention.to_k.weight"].form == "int8-b32"


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("layers.17.adaLN_modulation.0.weight", "is a part of Z-Image's transformer"),
        ("layers.0.adaLN_modulation.0.weight", "has no cap_embedder"),
    ],
)
def test_parts_of_a_file_are_refused(key, why, tmp_path):
    save_file({key: torch.zeros(4, 4)}, file := tmp_path / "part.safetensors")
    with pytest.raises(TightfitError, match=why):
        tightfit.inspect(str(file))


# ------------------------------------------------------------------------------------------- LoRAs

# How names begin, the ends of both factors, whether layers are those of Z-Image's own code, an alpha, and
# whether diffusers' conversion reads it.
FORMS = {
    "kohya": ("lora_unet_", "lora_up", "lora_down", True, 1.5, True),
    "kohya of diffusers' code": ("lora_unet_", "lora_up", "lora_down", False, 1.5, True),
    "ai-toolkit": ("diffusion_model.", "lora_B", "lora_A", False, None, True),
    "ComfyUI": ("diffusion_model.", "lora_B", "lora_A", True, None, False),
    "PEFT": ("base_model.model.", "lora_B.default", "lora_A.default", False, None, False),
    "diffusers": ("transformer.", "lora_B", "lora_A", False, None, True),
    "LyCORIS": ("lycoris_", "lora_up", "lora_down", False, 1.5, False),
}


def adapter(form, parts, file) -> dict[str, torch.Tensor]:
    """Write a LoRA of all layers of blocks; what it adds to the folder's weights."""
    before, up, down, theirs, alpha, _ = FORMS[form]
    weights = published(parts["transformer"]) if theirs else parts["transformer"]
    draw, stored, added = torch.Generator().manual_seed(3), {}, {}
    for name, tensor in weights.items():
        layer = name.removesuffix(".weight")
        if tensor.ndim != 2 or not layer.startswith(("layers.", "noise_", "context_")):
            continue
        (rows, columns), spelled = tensor.shape, layer.replace(".", "_") if before.endswith("_") else layer
        wide, narrow = torch.randn(rows, 3, generator=draw), torch.randn(3, columns, generator=draw) / 30
        stored |= {f"{before}{spelled}.{up}.weight": wide, f"{before}{spelled}.{down}.weight": narrow}
        stored |= {f"{before}{spelled}.alpha": torch.tensor(alpha)} if alpha else {}
        added[name] = wide @ narrow * (alpha / 3 if alpha else 1)
    save_file(stored, file)
    return converted(added) if theirs else added


def by_diffusers(file) -> dict[str, torch.Tensor]:
    from diffusers import ZImagePipeline

    state = {name.removeprefix("transformer."): t for name, t in ZImagePipeline.lora_state_dict(file).items()}
    ends = ".lora_A.weight", ".lora_B.weight"
    layers = {name.removesuffix(ends[0]) for name in state if name.endswith(ends[0])}
    return {f"{layer}.weight": state[layer + ends[1]] @ state[layer + ends[0]] for layer in layers}


@pytest.mark.parametrize("form", FORMS)
def test_loras_add_what_they_hold(form, folder, parts, tmp_path):
    added = adapter(form, parts, file := tmp_path / "style.safetensors")
    if FORMS[form][-1]:
        theirs = by_diffusers(file)
        assert theirs.keys() == added.keys()
        assert all(torch.allclose(theirs[name], rows, atol=1e-6) for name, rows in added.items())
    spec = tightfit.inspect(str(folder))
    changed = replace(REQUEST, adapters=(adapters.read_adapter(file),)).resolve(spec).spec
    assert changed.notes == spec.notes  # as each key fits
    assert all(patch.low_rank for patch in changed.denoiser.patches)  # so beside quantised weights, too
    for name, rows in added.items():
        meant = parts["transformer"][name] + rows
        torch.testing.assert_close(values(changed.denoiser.tensors[name]), meant, rtol=1e-5, atol=1e-6)


def test_a_layer_under_two_names_counts_once(folder, parts, tmp_path):
    """As some trainers write it, joined rows beside their parts."""
    layer, draw = "diffusion_model.layers.0.attention.", torch.Generator().manual_seed(5)
    down, up = torch.randn(2, 192, generator=draw), torch.randn(576, 2, generator=draw)
    stored = {f"{layer}qkv.lora.down.weight": down, f"{layer}qkv.lora.up.weight": up}
    for part, rows in zip("qkv", up.chunk(3), strict=True):
        stored |= {f"{layer}to_{part}.lora.down.weight": down}
        stored |= {f"{layer}to_{part}.lora.up.weight": rows}
    for name in ("out", "to_out.0"):
        stored |= {f"{layer}{name}.lora.down.weight": down}
        stored |= {f"{layer}{name}.lora.up.weight": up[:192]}
    save_file({name: one.clone() for name, one in stored.items()}, file := tmp_path / "style.safetensors")
    spec = tightfit.inspect(str(folder))
    changed = replace(REQUEST, adapters=(adapters.read_adapter(file),)).resolve(spec).spec
    assert any("4 of 12 keys are of layers that it has under" in note for note in changed.notes)
    assert not any("fit nothing" in note for note in changed.notes)
    for name, rows in by_diffusers(file).items():
        meant = parts["transformer"][name] + rows
        torch.testing.assert_close(values(changed.denoiser.tensors[name]), meant, rtol=1e-5, atol=1e-5)
