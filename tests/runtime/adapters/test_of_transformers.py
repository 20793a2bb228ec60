"""LoRAs of Flux.1 and SD 3.5, in each spelling: what diffusers' conversion of a whole model makes of a change
is what our weights change by."""

from __future__ import annotations

import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import tightfit
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from tightfit.runtime import adapters
from tightfit.runtime.errors import TightfitError

values = runpy.run_path(str(Path(__file__).parents[1] / "models/test_split_file.py"))["values"]
REQUEST = tightfit.Request("a red heart", width=64, height=64, num_inference_steps=1, seed=3)
# Layers of a block, by diffusers' names and by those of the models' own code.
JOINT = {
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin", "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
    "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm",
}  # fmt: skip
SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2", "attn.norm_q": "norm.query_norm",
          "attn.norm_k": "norm.key_norm"}  # fmt: skip
ENDS = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"}
OF_SD3 = {
    "attn.to_out.0": "x_block.attn.proj", "attn2.to_out.0": "x_block.attn2.proj", "norm_q": "ln_q",
    "attn.to_add_out": "context_block.attn.proj", "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1", "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2", "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2", "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k", "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k", "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
}  # fmt: skip


def swapped(tensor):
    return torch.cat(tensor.chunk(2)[::-1])


def embedder(name, theirs) -> str:
    """Of `time_text_embed`."""
    for ours, (before, layers) in theirs.items():
        for number, layer in enumerate(layers, 1):
            name = name.replace(f"time_text_embed.{ours}_embedder.linear_{number}", f"{before}.{layer}")
    return name


def of_flux(state) -> dict[str, torch.Tensor]:
    made = {}
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        ((kind, number, rest),) = re.findall(r"^(?:(single_)?transformer_blocks\.(\d+)\.)?(.+)", layer)
        if not number:
            made[embedder(name, {
                ours: (f"{before}_in", ("in_layer", "out_layer"))
                for ours, before in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance"))
            }) if layer not in ENDS else f"{ENDS[layer]}.{leaf}"] = tensor  # fmt: skip
            continue
        before = f"{'single' if kind else 'double'}_blocks.{number}"
        joined = {"attn.to_q": "img_attn.qkv", "attn.add_q_proj": "txt_attn.qkv"}
        if rest in joined:
            others = ["attn.to_q", "attn.to_k", "attn.to_v", *["proj_mlp"] * bool(kind)]
            if "add" in rest:
                others = [f"attn.add_{part}_proj" for part in "qkv"]
            rows = [state[name.replace(rest, other)] for other in others]
            made[f"{before}.{'linear1' if kind else joined[rest]}.{leaf}"] = torch.cat(rows)
        elif new := (SINGLE if kind else JOINT).get(rest):
            made[f"{before}.{new}.{'scale' if 'norm.' in new else leaf}"] = tensor
    for leaf in ("weight", "bias"):
        made[f"final_layer.adaLN_modulation.1.{leaf}"] = swapped(made.pop(f"norm_out.linear.{leaf}"))
    return made


def of_sd3(state) -> dict[str, torch.Tensor]:
    made, last = {}, max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        found = re.match(r"transformer_blocks\.(\d+)\.(.+)", layer)
        if not found:
            ends = {"pos_embed.proj": "x_embedder.proj", "proj_out": "final_layer.linear",
                    "norm_out.linear": "final_layer.adaLN_modulation.1"}  # fmt: skip
            made[f"{ends.get(layer, layer)}.{leaf}" if layer in ends else embedder(name, {
                ours: (f"{before}_embedder.mlp", "02") for ours, before in (("timestep", "t"), ("text", "y"))
            })] = swapped(tensor) if "norm_out" in layer else tensor  # fmt: skip
            continue
        number, rest = int(found[1]), found[2]
        joined = re.fullmatch(r"(attn2?)\.(to_|add_)q(_proj)?", rest)
        if joined:
            side = "context" if joined[3] else "x"
            rows = [state[re.sub("q(_proj)?$", rf"{p}\1", layer) + f".{leaf}"] for p in "qkv"]
            made[f"joint_blocks.{number}.{side}_block.{joined[1]}.qkv.{leaf}"] = torch.cat(rows)
        elif new := OF_SD3.get(rest):
            turned = number == last and rest == "norm1_context.linear"
            made[f"joint_blocks.{number}.{new}.{leaf}"] = swapped(tensor) if turned else tensor
    return {name.replace("pos_embed.pos_embed", "pos_embed"): tensor for name, tensor in made.items()}


def flux_by_diffusers(state) -> dict[str, torch.Tensor]:
    """It takes the rows of joined layers for those of the published width."""
    with pytest.MonkeyPatch.context() as patch:
        split = torch.split
        patch.setattr(torch, "split", lambda rows, sizes, dim=0: split(
            rows, [len(rows) * size // sum(sizes) for size in sizes], dim))  # fmt: skip
        return single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(dict(state))


MODELS = {
    "flux1-dev": (of_flux, flux_by_diffusers),
    "sd3": (
        of_sd3,
        lambda state: single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers({**state}),
    ),
}
# How names begin, the ends of both factors, and whether layers are those of the model's own code.
FORMS = {
    "kohya": ("lora_unet_", "lora_up", "lora_down", True),
    "ComfyUI": ("diffusion_model.", "lora_B", "lora_A", True),
    "PEFT of its own code": ("base_model.model.", "lora_B", "lora_A", True),
    "diffusers": ("transformer.", "lora_B", "lora_A", False),
    "LyCORIS of diffusers' code": ("lycoris_", "lora_up", "lora_down", False),
    "OneTrainer": ("lora_transformer_", "lora_up", "lora_down", False),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tiny_model):
    """The folder, the transformer's weights, and both ways between names."""
    folder = tiny_model(request.param)
    (file,) = (folder / "transformer").glob("*.safetensors")
    return folder, load_file(file), *MODELS[request.param]


def test_the_tests_mapping_is_diffusers(model):
    _, state, published, converted = model
    made = converted(published(state))
    assert made.keys() == state.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in state.items())


def changed_by(folder, file):
    return (
        replace(REQUEST, adapters=(adapters.read_adapter(file),)).resolve(tightfit.inspect(str(folder))).spec
    )


def written(weights, form, file) -> dict[str, torch.Tensor]:
    """A LoRA of every linear layer; what it adds to these weights."""
    draw, stored, added = torch.Generator().manual_seed(3), {}, {}
    before, up, down, _ = FORMS[form]
    for name, tensor in weights.items():
        added[name] = torch.zeros_like(tensor)
        if tensor.ndim != 2:
            continue
        layer, (rows, columns) = name.removesuffix(".weight"), tensor.shape
        wide, narrow = torch.randn(rows, 3, generator=draw), torch.randn(3, columns, generator=draw) / 30
        spelled = before + (layer.replace(".", "_") if before.endswith("_") else layer)
        stored |= {f"{spelled}.{up}.weight": wide, f"{spelled}.{down}.weight": narrow}
        stored |= {f"{spelled}.alpha": torch.tensor(1.5)} if up == "lora_up" else {}
        added[name] = wide @ narrow * (0.5 if up == "lora_up" else 1.0)
    save_file(stored, file)
    return added


def check(spec, state, added) -> None:
    for name, tensor in spec.denoiser.tensors.items():
        torch.testing.assert_close(values(tensor), state[name] + added[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_loras_add_what_they_hold(form, model, tmp_path):
    folder, state, published, converted = model
    theirs = FORMS[form][-1]
    added = written(published(state) if theirs else state, form, file := tmp_path / "style.safetensors")
    spec = changed_by(folder, file)
    assert spec.notes == tightfit.inspect(str(folder)).notes  # as each key fits
    assert all(patch.low_rank for patch in spec.denoiser.patches)  # so beside quantised weights, too
    check(spec, state, converted(added) if theirs else added)


XLABS = {
    "double_blocks.1.processor.qkv_lora1": (192, 64), "double_blocks.0.processor.proj_lora1": (64, 64),
    "double_blocks.1.processor.qkv_lora2": (192, 64), "double_blocks.0.processor.proj_lora2": (64, 64),
    "single_blocks.1.processor.qkv_lora": (192, 64), "single_blocks.0.processor.proj_lora": (64, 320),
}  # fmt: skip


def test_xlabs_names_are_diffusers(tiny_model, tmp_path):
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers

    folder, draw, stored = tiny_model("flux1-dev"), torch.Generator().manual_seed(3), {}
    for layer, (rows, columns) in XLABS.items():
        stored[f"{layer}.up.weight"] = torch.randn(rows, 2, generator=draw)
        stored[f"{layer}.down.weight"] = torch.randn(2, columns, generator=draw)
    save_file(stored, file := tmp_path / "xlabs.safetensors")
    theirs = _convert_xlabs_flux_lora_to_diffusers(dict(stored))
    spec, plain = changed_by(folder, file), tightfit.inspect(str(folder))
    assert spec.notes == plain.notes
    state = {name: values(tensor) for name, tensor in plain.denoiser.tensors.items()}
    added = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for name in (name for name in theirs if "lora_B" in name):
        product = theirs[name] @ theirs[name.replace("lora_B", "lora_A")]
        added[name.removeprefix("transformer.").replace(".lora_B", "")] = product
    check(spec, state, added)


TEXTS = {
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": "text_encoder",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1": "text_encoder",
    "text_encoder_{}.encoder.block.0.layer.1.DenseReluDense.wo": "text_encoder_{}",
    "lora_te{}_encoder_block_0_layer_0_SelfAttention_q": "text_encoder_{}",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": "text_encoder_{}",
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q": "text_encoder_{}",
}


@pytest.mark.parametrize(("family", "number"), [("flux1-dev", 2), ("sd3", 3)])
def test_text_encoders(family, number, tiny_model, tmp_path):
    spec = tightfit.inspect(str(tiny_model(family)))
    places = adapters.lora.Places(spec)
    for layer, name in TEXTS.items():
        assert (found := places.find(layer.format(number))), layer
        assert found[0] is spec.components[name.format(number)]
        assert f"{found[1].paths[0]}.weight" in found[0].tensors


@pytest.mark.parametrize("there", ["to_q", "to_v"])
def test_parts_beside_joined_rows_are_taken_alone(there, tiny_model, tmp_path):
    """Of joined rows, what is left."""
    folder, draw = tiny_model("flux1-dev"), torch.Generator().manual_seed(3)
    down, up, own = (torch.randn(*shape, generator=draw) for shape in ((2, 64), (192, 2), (64, 2)))
    joined, alone = (
        "diffusion_model.double_blocks.0.img_attn.qkv",
        f"transformer.transformer_blocks.0.attn.{there}",
    )
    save_file({f"{joined}.lora_A.weight": down, f"{joined}.lora_B.weight": up,
               f"{alone}.lora_A.weight": down.clone(), f"{alone}.lora_B.weight": own},
              file := tmp_path / "both.safetensors")  # fmt: skip
    spec, plain = changed_by(folder, file), tightfit.inspect(str(folder))
    assert spec.notes == plain.notes
    for part, rows in zip(("to_q", "to_k", "to_v"), up.chunk(3), strict=True):
        name = f"transformer_blocks.0.attn.{part}.weight"
        wanted = values(plain.denoiser.tensors[name]) + (own if part == there else rows) @ down
        torch.testing.assert_close(values(spec.denoiser.tensors[name]), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "layer", ["single_blocks.1.linear1", "final_layer.adaLN_modulation.1"], ids=["joined", "turned"]
)
@pytest.mark.parametrize("form", ["lokr", "diff"])
def test_other_forms_change_parts_of_rows(layer, form, tiny_model, tmp_path):
    folder, draw = tiny_model("flux1-dev"), torch.Generator().manual_seed(3)
    plain = tightfit.inspect(str(folder))
    state = {name: values(tensor) for name, tensor in plain.denoiser.tensors.items()}
    published = of_flux({name: torch.zeros_like(tensor) for name, tensor in state.items()})
    rows = published[f"{layer}.weight"].shape[0]
    first, second = torch.randn(rows // 16, 8, generator=draw), torch.randn(16, 8, generator=draw)
    whole = torch.kron(first, second)
    stored = {"lokr_w1": first, "lokr_w2": second} if form == "lokr" else {"diff": whole}
    save_file(
        {f"diffusion_model.{layer}.{kind}": one for kind, one in stored.items()},
        file := tmp_path / "a.safetensors",
    )
    spec = changed_by(folder, file)
    check(spec, state, flux_by_diffusers(published | {f"{layer}.weight": whole}))


def test_joined_rows_change_layers_in_formats_of_their_own(tiny_model, tmp_path):
    """A calibrated export has one part of a joined layer in 16 bits, and others quantised."""
    spec, place = tightfit.inspect(str(tiny_model("flux1-dev"))), "transformer_blocks.0.attn"
    tensors = dict(spec.denoiser.tensors)
    tensors[f"{place}.to_q.packed"] = tensors.pop(f"{place}.to_q.weight")
    mixed = replace(spec.denoiser, tensors=tensors)
    layer = "diffusion_model.double_blocks.0.img_attn.qkv"
    save_file({f"{layer}.lora_A.weight": torch.ones(2, 64), f"{layer}.lora_B.weight": torch.ones(192, 2)},
              file := tmp_path / "style.safetensors")  # fmt: skip
    of_mixed = replace(spec, components={**spec.components, mixed.name: mixed})
    changed = adapters.read_adapter(file).apply(of_mixed).denoiser.tensors
    assert {name for name, tensor in changed.items() if tensor.patches} == {
        f"{place}.{part}" for part in ("to_q.packed", "to_k.weight", "to_v.weight")
    }


@pytest.mark.parametrize("rows", [4, 384], ids=["fewer", "more"])
def test_turned_rows_of_another_count_fit_nothing(rows, tiny_model, tmp_path):
    """The last block's layer has 128 rows; the same of other blocks has 384."""
    layer = "diffusion_model.joint_blocks.2.context_block.adaLN_modulation.1"
    proj = "diffusion_model.joint_blocks.1.context_block.attn.proj"
    stored = {f"{layer}.lora_A.weight": torch.ones(2, 64), f"{layer}.lora_B.weight": torch.ones(rows, 2)}
    stored |= {f"{proj}.lora_A.weight": torch.ones(2, 64), f"{proj}.lora_B.weight": torch.ones(64, 2)}
    save_file(stored, file := tmp_path / "style.safetensors")
    spec = changed_by(tiny_model("sd3"), file)
    assert any("2 of 4 keys fit nothing" in note for note in spec.notes)
    assert not spec.denoiser.tensors["transformer_blocks.2.norm1_context.linear.weight"].patches


def test_anothers_are_refused_by_name(model, tiny_model, tmp_path):
    """Though some layers of klein's fit, where both are as wide."""
    folder, state, published, _ = model
    written(published(state), "kohya", file := tmp_path / "style.safetensors")
    klein = tiny_model("flux2-klein")
    with pytest.raises(TightfitError, match=r"style is for (Flux\.1|SD 3); .* is Flux\.2 klein"):
        changed_by(klein, file)
    (weights,) = (klein / "transformer").glob("*.safetensors")
    written(load_file(weights), "diffusers", file := tmp_path / "klein.safetensors")
    with pytest.raises(TightfitError, match=r"klein is for Flux\.2; "):
        changed_by(folder, file)
