"""A denoiser, a text encoder and a VAE in files of their own, as ComfyUI has Flux.2 klein: the same model as
the diffusers folder of these weights, whose pictures are diffusers' (test_flux2_klein.py)."""

from __future__ import annotations

import re
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import tightfit
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from tightfit.export import random_model
from tightfit.kernels.formats import FORMATS, dequantise
from tightfit.runtime import adapters
from tightfit.runtime.backends.torch import loading
from tightfit.runtime.catalogue import described
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models.layouts import library, split_file
from transformers import Qwen2Tokenizer

REQUEST = tightfit.Request("a red heart", width=64, height=96, num_inference_steps=2, seed=5)
WAY = {"device": "cpu", "attention": "sdpa", "tiling": "whole", "residency": "staged"}
NAMES = "flux-2-klein-4b.safetensors", "qwen_3_4b.safetensors", "flux2-vae.safetensors"
DENOISER, ENCODER, VAE = NAMES
SHELVES = {DENOISER: "diffusion_models", ENCODER: "text_encoders", VAE: "vae"}


@pytest.fixture(scope="module")
def folder(made_once):
    return made_once("models/flux2-klein-32", write_folder)


@pytest.fixture(scope="module")
def parts(folder):
    return parts_of(folder)


@pytest.fixture(scope="module")
def comfy(folder, parts, made_once):
    return made_once(
        "comfy/klein", lambda models: write_comfy(models, folder, published(parts["transformer"]))
    )


def write_folder(place, family="flux2-klein") -> None:
    """Tiny, but with what no shape tells as published."""
    tiny = random_model.TINY[family]
    vae = tiny["vae"] | {"block_out_channels": (32, 32, 64, 64), "norm_num_groups": 32}
    texts = tiny["text_encoder"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(random_model.TINY, family, tiny | {"vae": vae, "text_encoder": texts})
        random_model.write(family, place, tiny=True, precision="fp32")


def parts_of(folder) -> dict[str, dict[str, torch.Tensor]]:
    names = ("transformer", "text_encoder", "vae")
    return {name: load_file(next((folder / name).glob("*.safetensors"))) for name in names}


def write_comfy(models, folder, transformer, names=NAMES):
    """The folder `models` of ComfyUI with the three files. The denoiser's is answered."""
    parts = parts_of(folder)
    states = transformer, parts["text_encoder"], published_vae(parts["vae"])
    for shelf, name, state in zip(SHELVES.values(), names, states, strict=True):
        (models / shelf).mkdir(parents=True)
        save_file(state, models / shelf / name)
    Qwen2Tokenizer.from_pretrained(folder / "tokenizer").save_pretrained(
        models / SHELVES[ENCODER] / "tokenizer"
    )
    (models / SHELVES[ENCODER] / "tokenizer/tokenizer_config.json").unlink()  # one file is enough
    return models / SHELVES[DENOISER] / names[0]


# ------------------------------------------------------- the test's own mapping, of Black Forest Labs' code

TOP = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
       "norm_out.linear": "final_layer.adaLN_modulation.1",
       "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
       "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer"}  # fmt: skip
TOP |= {f"{name}.linear": f"{name}.lin" for name in ("double_stream_modulation_img",
        "double_stream_modulation_txt", "single_stream_modulation")}  # fmt: skip
DOUBLE = {"attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
          "attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm",
          "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "ff.linear_in": "img_mlp.0",
          "ff.linear_out": "img_mlp.2", "ff_context.linear_in": "txt_mlp.0",
          "ff_context.linear_out": "txt_mlp.2"}  # fmt: skip
SINGLE = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2", "attn.norm_q": "norm.query_norm",
          "attn.norm_k": "norm.key_norm"}  # fmt: skip
JOINED = {"img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
          "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")}  # fmt: skip
BLOCKS = (("transformer_blocks", DOUBLE, "double"), ("single_transformer_blocks", SINGLE, "single"))


def published(state) -> dict[str, torch.Tensor]:
    made = {f"{old}.weight": state[f"{new}.weight"] for new, old in TOP.items()}
    scale, shift = made["final_layer.adaLN_modulation.1.weight"].chunk(2)
    made["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    for number in range(2):
        for place, names, kind in BLOCKS:
            for new, old in names.items():
                leaf = "scale" if "norm" in old else "weight"
                made[f"{kind}_blocks.{number}.{old}.{leaf}"] = state[f"{place}.{number}.{new}.weight"]
        for old, names in JOINED.items():
            rows = [state[f"transformer_blocks.{number}.{new}.weight"] for new in names]
            made[f"double_blocks.{number}.{old}.weight"] = torch.cat(rows)
    return {name: tensor.contiguous() for name, tensor in made.items()}


def published_vae(state) -> dict[str, torch.Tensor]:
    words = (("mid_block.attentions.0", "mid.attn_1"), ("resnets", "block"), ("samplers.0", "sample"),
             ("group_norm", "norm"), ("to_out.0", "proj_out"), ("conv_norm_out", "norm_out"),
             ("conv_shortcut", "nin_shortcut"), ("to_", ""))  # fmt: skip
    batch_norm = {"bn.num_batches_tracked": torch.zeros((), dtype=torch.int64)}
    made = batch_norm if "bn.running_mean" in state else {}
    for name, tensor in state.items():
        pixel = ".attentions." in name and tensor.ndim == 2
        old = re.sub(r"down_blocks\.(\d)\.", r"down.\1.", name)
        old = re.sub(r"up_blocks\.(\d)\.", lambda found: f"up.{3 - int(found[1])}.", old)
        old = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", old)
        for new, word in words:
            old = old.replace(new, word)
        old = re.sub(r"^quant_conv", "encoder.quant_conv", old)
        old = re.sub(r"^post_quant_conv", "decoder.post_quant_conv", old)
        made[old] = tensor[:, :, None, None] if pixel else tensor
    return {name: tensor.contiguous() for name, tensor in made.items()}


# ------------------------------------------------------------------------------------------ reading


def values(tensor) -> torch.Tensor:
    """By way of an engine's own reading."""
    out = torch.empty(tensor.shape)
    loading.read_into(out, tensor, torch.empty(tensor.stored_bytes, dtype=torch.uint8))
    return out


def check_values(component, meant) -> None:
    for name, tensor in component.tensors.items():
        torch.testing.assert_close(values(tensor).flatten(), meant[name].float().flatten(), rtol=0, atol=0)


def painted(model, request=REQUEST, precision="fp32"):
    with tightfit.load(str(model), precision=precision, **WAY) as ours:
        return ours.generate(request)


@pytest.fixture(scope="module")
def wanted(folder):
    return painted(folder)


def check_same(result, wanted) -> None:
    """The picture, and bytes planned and taken."""
    assert result.images[0].tobytes() == wanted.images[0].tobytes()
    for stage, predicted in wanted.plan.predicted.stages.items():
        assert abs(result.plan.predicted.stages[stage] - predicted) <= 0.01 * predicted, stage
        assert abs(result.stages[stage].peak_bytes - predicted) <= 0.05 * predicted, stage


def given(**files) -> tuple:
    return adapters.written({option: [str(file)] for option, file in files.items()})


def test_the_tests_mapping_is_diffusers(parts):
    from diffusers.loaders import single_file_utils

    convert = single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers
    made = convert(published(parts["transformer"]))
    assert made.keys() == parts["transformer"].keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in parts["transformer"].items())


def test_files_found_beside_are_the_model(comfy, folder, parts, wanted):
    file = comfy / SHELVES[DENOISER] / DENOISER
    spec, other = tightfit.inspect(str(file)), tightfit.inspect(str(folder))
    for name, component in spec.components.items():
        assert component.tensors.keys() == {*other.components[name].tensors} - {"bn.num_batches_tracked"}
        check_values(component, parts[component.network.folder])
    assert spec.is_distilled
    assert any("qwen_3_4b" in note and "flux2-vae" in note for note in spec.notes)
    check_same(painted(file), wanted)


def test_files_are_named_by_options(comfy, folder, tmp_path, wanted):
    shutil.copy(comfy / SHELVES[DENOISER] / DENOISER, alone := tmp_path / DENOISER)
    with pytest.raises(
        TightfitError, match=r"a Qwen3 64 wide .*--text-encoder FILE; .* of 8 channels .*--vae"
    ):
        REQUEST.resolve(tightfit.inspect(str(alone)))
    named = {"text_encoder": comfy / SHELVES[ENCODER] / ENCODER, "vae": comfy / SHELVES[VAE] / VAE}
    check_same(painted(alone, replace(REQUEST, adapters=given(**named))), wanted)
    named["unet"] = comfy / SHELVES[DENOISER] / DENOISER
    changed = replace(REQUEST, adapters=given(**named)).resolve(tightfit.inspect(str(folder))).spec
    assert {component.folder for component in changed.components.values()} == {*named.values()}


def test_a_name_finds_all(comfy, monkeypatch):
    monkeypatch.setenv(library.ENVIRONMENT, str(comfy))
    spec = tightfit.inspect("flux-2-klein-4b")
    assert [component.folder.name for component in spec.components.values()] == [ENCODER, DENOISER, VAE]
    kinds = {entry.path.name: described(entry).kind for entry in library.scan([comfy]).entries}
    assert kinds == {DENOISER: "checkpoint", ENCODER: "text encoder", VAE: "VAE"}


@pytest.mark.parametrize(
    ("shelf", "change", "why"),
    [
        ("text_encoders/tokenizer", shutil.rmtree, r"no tokenizer beside it: put tokenizer\.json"),
        ("vae/flux2-vae.safetensors", lambda file: file.unlink(), "a VAE of 8 channels"),
        (f"vae/{VAE}", lambda file: shutil.copy(file, file.with_name("other.safetensors")), "are both for"),
        (f"vae/{VAE}", lambda file: file.write_bytes(file.read_bytes()[:-1]), "a VAE of 8 channels"),
    ],
)
def test_what_is_missing_is_one_line(comfy, tmp_path, shelf, change, why):
    shutil.copytree(comfy, models := tmp_path / "models")
    change(models / shelf)
    with pytest.raises(TightfitError, match=why) as error:
        REQUEST.resolve(tightfit.inspect(str(models / SHELVES[DENOISER] / DENOISER)))
    assert "\n" not in str(error.value)


def test_an_export_is_that_of_the_folder(comfy, folder, tmp_path):
    models = {"split": comfy / SHELVES[DENOISER] / DENOISER, "whole": folder}
    made = [tightfit.export_model(str(model), tmp_path / name, "int8") for name, model in models.items()]
    for part in ("text_encoder", "transformer", "vae"):
        one, other = (load_file(next((out / part).glob("*.safetensors"))) for out in made)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    check = [tightfit.inspect(str(out)) for out in made]
    assert check[0].is_distilled
    assert REQUEST.resolve(check[0]).prompting.encodings == REQUEST.resolve(check[1]).prompting.encodings


def test_the_base_model_is_known_by_its_name(comfy, folder, tmp_path):
    shutil.copy(comfy / SHELVES[DENOISER] / DENOISER, file := tmp_path / "flux-2-klein-base-4b.safetensors")
    shutil.copytree(folder / "transformer", parts := tmp_path / "FLUX.2-klein-base-4B/transformer")
    for model in (file, parts, next(parts.glob("*.safetensors"))):
        spec = tightfit.inspect(str(model))
        assert (spec.is_distilled, spec.default_steps, spec.default_guidance) == (False, 50, 4.0)
    for unet, notes in ((file, 1), (comfy / SHELVES[DENOISER] / DENOISER, 0)):  # over one that was distilled
        changed = replace(REQUEST, adapters=given(unet=unet)).resolve(tightfit.inspect(str(folder))).spec
        assert sum("the base model, by its name" in note for note in changed.notes) == notes


@pytest.mark.parametrize("option", ["text_encoder", "vae", "unet"])
def test_other_files_are_refused(comfy, folder, sd1, option):
    wrong = {"text_encoder": comfy / SHELVES[VAE] / VAE, "vae": sd1 / "vae",
             "unet": sd1 / "unet/diffusion_pytorch_model.safetensors"}  # fmt: skip
    with pytest.raises(TightfitError, match=r"holds no Qwen3|holds a AutoencoderKL|nowhere"):
        replace(REQUEST, adapters=given(**{option: wrong[option]})).resolve(tightfit.inspect(str(folder)))
    if option == "text_encoder":
        with pytest.raises(TightfitError, match="reads texts by CLIP"):
            encoder = given(text_encoder=comfy / SHELVES[ENCODER] / ENCODER)
            replace(REQUEST, adapters=encoder).resolve(tightfit.inspect(str(sd1)))


# ---------------------------------------------------------------------------------- formats and adapters


def in_fp8(state) -> tuple[dict, dict]:
    """Matrices as Black Forest Labs writes them: fp8 with a scale, and one for what the layer is given."""
    stored, meant = dict(state), dict(state)
    for name, tensor in state.items():
        if re.search(r"_blocks|layers", name) and tensor.ndim == 2:
            layer, scale = name.removesuffix(".weight"), tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            meant[name] = stored[name].float() * scale
            stored |= {f"{layer}.weight_scale": scale, f"{layer}.input_scale": scale.clone()}
            stored[f"{layer}.comfy_quant"] = torch.zeros(30, dtype=torch.uint8)
    return stored, meant


def in_bf16(state) -> tuple[dict, dict]:
    rounded = {name: tensor.bfloat16() for name, tensor in state.items()}
    return rounded, rounded


def in_gguf(state, file, kind, names=lambda name: name, arch="flux", plain=("_in.",)) -> dict:
    """Write matrices in blocks, as ComfyUI-GGUF and llama.cpp do, but `plain` ones; what they stand for."""
    writer, meant = gguf.GGUFWriter(str(file), arch), {}
    for name, tensor in state.items():
        data, stored = tensor.numpy(), names(name)
        values, size = gguf.GGML_QUANT_SIZES[Type[kind]]
        if data.ndim < 2 or data.size % values or any(word in name for word in plain):
            writer.add_tensor(stored, data)
            meant[name] = tensor
            continue
        if data.shape[-1] % values:  # as ComfyUI-GGUF has narrow ones
            writer.add_array(f"comfy.gguf.orig_shape.{stored}", list(data.shape))
        rows = data.reshape(-1, data.shape[-1] if data.shape[-1] % values == 0 else values)
        if kind == "Q8_0":
            blocks = quantize(rows, Type[kind])
        else:  # gguf writes none of these: random codes
            draw = np.random.default_rng(data.size)
            blocks = draw.integers(0, 256, (len(rows), rows.shape[1] // values * size), np.uint8)
            blocks.reshape(-1, size)[:, :4] = np.array([0.0004, 0.003], np.float16).view(np.uint8)
        writer.add_tensor(stored, blocks, raw_dtype=Type[kind])
        meant[name] = torch.from_numpy(dequantize(blocks, Type[kind])).view(tensor.shape)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return meant


def converted(state) -> dict[str, torch.Tensor]:
    from diffusers.loaders import single_file_utils

    return single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(dict(state))


def test_blocks_of_scales_are_refused_by_name(folder, parts, tmp_path):
    """As nvfp4 has them."""
    scales = {"single_blocks.0.linear1.weight_scale": torch.zeros(4, 4, dtype=torch.float8_e4m3fn)}
    save_file(published(parts["transformer"]) | scales, file := tmp_path / DENOISER)
    with pytest.raises(TightfitError, match=r"16 scales of type F8_E4M3 in single_blocks\.0\.linear1"):
        replace(REQUEST, adapters=given(unet=file)).resolve(tightfit.inspect(str(folder)))


@pytest.mark.parametrize("written", [in_fp8, in_bf16])
def test_formats_are_read_as_what_they_stand_for(written, comfy, folder, parts, tmp_path):
    stored, meant = written(published(parts["transformer"]))
    save_file(stored, file := tmp_path / DENOISER)
    named = given(unet=file, text_encoder=comfy / SHELVES[ENCODER] / ENCODER)
    spec = replace(REQUEST, adapters=named).resolve(tightfit.inspect(str(folder))).spec
    check_values(spec.denoiser, converted(meant))


def gguf_files(parts, root, kind, denoiser=published, arch="flux") -> tuple[dict, dict]:
    """Write a denoiser and a text encoder; what each stands for."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 36)
    meant = in_gguf(denoiser(parts["transformer"]), root / "denoiser.gguf", kind, arch=arch)
    texts = in_gguf(parts["text_encoder"], root / "qwen.gguf", kind, arch="qwen3",
                    names=lambda name: names.get_name(name, (".weight",)))  # fmt: skip
    return meant, texts


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_gguf_is_read_as_what_it_stands_for(kind, folder, parts, tmp_path):
    meant, texts = gguf_files(parts, tmp_path, kind)
    named = given(unet=tmp_path / "denoiser.gguf", text_encoder=tmp_path / "qwen.gguf")
    spec = replace(REQUEST, adapters=named).resolve(tightfit.inspect(str(folder))).spec
    check_values(spec.denoiser, converted(meant))
    check_values(spec.text_encoders[0], texts)
    if kind == "Q8_0":  # layers keep these codes, of parts of tensors too
        assert spec.denoiser.tensors["transformer_blocks.1.attn.to_k.weight"].form == "int8-b32"


def adapter(form, state, folder, file) -> dict[str, torch.Tensor]:
    """Write a LoRA of each layer, in one of the spellings; what it adds to the folder's weights."""
    draw, stored, added = torch.Generator().manual_seed(3), {}, {}
    ours = {name.removesuffix(".weight") for name in folder if folder[name].ndim == 2 and "blocks" in name}
    theirs = {name.removesuffix(".weight") for name in state if state[name].ndim == 2 and "blocks" in name}
    before, up, down, bfl = FORMS[form]
    for layer in sorted(theirs if bfl else ours):
        rows, columns = (state if bfl else folder)[f"{layer}.weight"].shape
        wide, narrow = torch.randn(rows, 3, generator=draw), torch.randn(3, columns, generator=draw) / 30
        name = before + (layer.replace(".", "_") if before.endswith("_") else layer)
        stored |= {f"{name}.{up}.weight": wide, f"{name}.{down}.weight": narrow}
        if up == "lora_up":
            stored[f"{name}.alpha"] = torch.tensor(1.5)
        added[f"{layer}.weight"] = wide @ narrow * (0.5 if up == "lora_up" else 1.0)
    save_file(stored, file)
    return added


FORMS = {
    "kohya": ("lora_unet_", "lora_up", "lora_down", True),
    "BFL": ("diffusion_model.", "lora_B", "lora_A", True),
    "PEFT of BFL's code": ("base_model.model.", "lora_B", "lora_A", True),
    "diffusers": ("transformer.", "lora_B", "lora_A", False),
    "LyCORIS of diffusers' code": ("lycoris_", "lora_up", "lora_down", False),
}


@pytest.mark.parametrize("form", FORMS)
def test_loras_add_what_they_hold(form, folder, parts, tmp_path):
    state, weights = published(parts["transformer"]), parts["transformer"]
    added = adapter(form, state, weights, file := tmp_path / "style.safetensors")
    if FORMS[form][3]:
        empty = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        added = converted(empty | added)
    spec = tightfit.inspect(str(folder))
    changed = replace(REQUEST, adapters=(adapters.read_adapter(file),)).resolve(spec).spec
    assert changed.notes == spec.notes  # as each key fits
    assert all(patch.low_rank for patch in changed.denoiser.patches)  # so beside quantised weights, too
    for name, tensor in changed.denoiser.tensors.items():
        meant = weights[name] + added.get(name, torch.zeros(()))
        torch.testing.assert_close(values(tensor), meant, rtol=1e-5, atol=1e-6)


def test_other_forms_change_parts_of_rows(folder, parts, tmp_path):
    """LoKr of a layer whose rows are those of three here, as ai-toolkit writes it: no part has factors."""
    draw, width = torch.Generator().manual_seed(1), 64
    first, second = torch.randn(6, 4, generator=draw), torch.randn(width // 2, width // 4, generator=draw)
    layer = "diffusion_model.double_blocks.1.txt_attn.qkv"
    save_file({f"{layer}.lokr_w1": first, f"{layer}.lokr_w2": second}, file := tmp_path / "kron.safetensors")
    spec = (
        replace(REQUEST, adapters=(adapters.read_adapter(file),)).resolve(tightfit.inspect(str(folder))).spec
    )
    for part, rows in zip(
        ("add_q_proj", "add_k_proj", "add_v_proj"), torch.kron(first, second).chunk(3), strict=True
    ):
        name = f"transformer_blocks.1.attn.{part}.weight"
        torch.testing.assert_close(values(spec.denoiser.tensors[name]), parts["transformer"][name] + rows)


# ------------------------------------------------------------------------------- several in one, in NF4

BITSANDBYTES = runpy.run_path(str(Path(__file__).with_name("test_bitsandbytes.py")))  # its writer


def in_one(parts, written, before_vae, names=(published, converted)) -> tuple[dict, dict]:
    """All three in one file, as ComfyUI saves a checkpoint; what each stands for. names: of a transformer, to
    those of its own code and back."""
    state, meant = written(names[0](parts["transformer"]))
    texts, said = written(parts["text_encoder"])
    vae, seen = in_bf16(parts["vae"])
    stored = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    stored |= {f"text_encoders.qwen3_4b.transformer.{name}": tensor for name, tensor in texts.items()}
    stored |= {f"{before_vae}{name}": tensor for name, tensor in published_vae(vae).items()}
    stored |= {"text_encoders.qwen3_4b.logit_scale": torch.ones(())}
    return stored, {"transformer": names[1](meant), "text_encoder": said, "vae": seen}


@pytest.mark.parametrize(("written", "before"), [(in_bf16, "vae."), (in_fp8, "first_stage_model.")])
def test_a_checkpoint_with_all_networks_inside_is_the_model(
    written, before, comfy, folder, parts, tmp_path, check_predicted, monkeypatch
):
    stored, meant = in_one(parts, written, before)
    save_file(stored, file := tmp_path / "klein-aio.safetensors")
    with pytest.raises(TightfitError, match=r"aio\.safetensors has no tokenizer beside it"):
        REQUEST.resolve(tightfit.inspect(str(file)))
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    with monkeypatch.context() as patch:
        patch.setattr(split_file, "near", None)  # no folder is looked through
        spec = tightfit.inspect(str(file))
    for component in spec.components.values():
        check_values(component, meant[component.network.folder])
    check_predicted(painted(file))
    alone = shutil.copy(comfy / SHELVES[DENOISER] / DENOISER, tmp_path / DENOISER)
    with pytest.raises(TightfitError, match="none is near it"):  # what is inside another model is that's
        REQUEST.resolve(tightfit.inspect(str(alone)))


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "int8"])
def test_files_of_bitsandbytes_are_read_as_what_they_stand_for(
    kind, folder, parts, tmp_path, check_predicted
):
    """Of a tensor that is three here, and of one whose halves are turned, the scales are too."""
    state = published(parts["transformer"])
    layers = [name.removesuffix(".weight") for name in state if "blocks" in name and state[name].ndim == 2]
    stored, means = BITSANDBYTES["quantised"](state, kind, [*layers, "final_layer.adaLN_modulation.1"])
    save_file({f"model.diffusion_model.{name}": t for name, t in stored.items()}, file := tmp_path / DENOISER)
    request, meant = replace(REQUEST, adapters=given(unet=file)), converted(state | means)
    spec = request.resolve(tightfit.inspect(str(folder))).spec
    check_values(spec.denoiser, meant)
    kept = {name: tensor for name, tensor in spec.denoiser.tensors.items() if tensor.form}
    assert len(kept) == len(layers) + 1 + 2 * 4  # of four tensors each is three
    for name, tensor in kept.items():
        raw = torch.empty(tensor.stored_bytes, dtype=torch.uint8)
        tensor.read_into(raw.numpy().data)
        codes = tensor.encoding.packed(raw, tensor.shape, loading._stored_beside(tensor.encoding))
        torch.testing.assert_close(dequantise(codes, FORMATS[tensor.form], tensor.shape), meant[name])
    if kind == "nf4-nested":
        check_predicted(painted(folder, request, "int4"))
