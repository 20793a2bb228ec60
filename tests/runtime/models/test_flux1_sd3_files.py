"""Flux.1's and SD 3.5's own files, as ComfyUI has them: what diffusers' conversions make of the names, and
the model of the diffusers folder of these weights, whose pictures are diffusers' (test_flux1, test_sd3)."""

from __future__ import annotations

import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import tightfit
import torch
from safetensors.torch import load_file, save_file
from tightfit.__main__ import app
from tightfit.export import random_model
from tightfit.export.folder import described as described_folder
from tightfit.runtime import adapters, infotext
from tightfit.runtime.catalogue import described
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models import vocabulary
from tightfit.runtime.models.layouts import library, split_file
from tightfit.runtime.models.layouts.published import told, transformer
from tightfit.runtime.models.layouts.weights import read_file
from tightfit.runtime.models.tensors import Tensor
from typer.testing import CliRunner

SPLIT = runpy.run_path(str(Path(__file__).with_name("test_split_file.py")))
REQUEST, given, painted, values = (SPLIT[name] for name in ("REQUEST", "given", "painted", "values"))
REQUEST = replace(REQUEST, num_inference_steps=1)
SHELVES = {"transformer": "diffusion_models", "text_encoder": "clip", "text_encoder_2": "text_encoders",
           "text_encoder_3": "text_encoders", "vae": "vae"}  # fmt: skip
FLUX = {"transformer": "flux1-dev", "text_encoder": "clip_l", "text_encoder_2": "t5xxl_fp16", "vae": "ae"}
NAMES = {
    "flux1-dev": FLUX,
    "flux1-schnell": FLUX | {"transformer": "flux1-schnell"},
    "sd3": {"transformer": "sd3.5_medium", "text_encoder": "clip_l", "text_encoder_2": "clip_g",
            "text_encoder_3": "t5xxl_fp16", "vae": "sd3_vae"},
}  # fmt: skip
T5 = {"flux1-dev": "text_encoder_2", "flux1-schnell": "text_encoder_2", "sd3": "text_encoder_3"}

# ------------------------------------------------------------------ the test's own mapping, of both codes

FLUX_TOP = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
            "norm_out.linear": "final_layer.adaLN_modulation.1"}  # fmt: skip
FLUX_TOP |= {f"time_text_embed.{new}_embedder.linear_{n}": f"{old}_in.{end}_layer" for n, end in
             ((1, "in"), (2, "out")) for new, old in
             (("timestep", "time"), ("text", "vector"), ("guidance", "guidance"))}  # fmt: skip
FLUX_DOUBLE = {"norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
               "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
               "attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm",
               "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
               "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2", "ff_context.net.0.proj": "txt_mlp.0",
               "ff_context.net.2": "txt_mlp.2"}  # fmt: skip
FLUX_SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2", "attn.norm_q": "norm.query_norm",
               "attn.norm_k": "norm.key_norm"}  # fmt: skip
SD3_TOP = {"pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder",
           "proj_out": "final_layer.linear", "norm_out.linear": "final_layer.adaLN_modulation.1"}  # fmt: skip
SD3_TOP |= {f"time_text_embed.{new}_embedder.linear_{n}": f"{old}_embedder.mlp.{2 * n - 2}"
            for n in (1, 2) for new, old in (("timestep", "t"), ("text", "y"))}  # fmt: skip
SD3_BLOCK = {"norm1.linear": "x_block.adaLN_modulation.1", "attn.norm_q": "x_block.attn.ln_q",
             "attn.norm_k": "x_block.attn.ln_k", "attn.norm_added_q": "context_block.attn.ln_q",
             "attn.norm_added_k": "context_block.attn.ln_k", "attn.to_out.0": "x_block.attn.proj",
             "norm1_context.linear": "context_block.adaLN_modulation.1", "ff.net.0.proj": "x_block.mlp.fc1",
             "attn.to_add_out": "context_block.attn.proj", "ff.net.2": "x_block.mlp.fc2",
             "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
             "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k",
             "attn2.to_out.0": "x_block.attn2.proj"}  # fmt: skip
QKV, ADDED = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)
# By how blocks begin there and here: layers of one name, and those that are joined.
FLUX_BLOCKS = {
    ("double_blocks", "transformer_blocks"): (FLUX_DOUBLE, {"img_attn.qkv": QKV, "txt_attn.qkv": ADDED}),
    ("single_blocks", "single_transformer_blocks"): (FLUX_SINGLE, {"linear1": (*QKV, "proj_mlp")}),
}
SD3_BLOCKS = {("joint_blocks", "transformer_blocks"): (SD3_BLOCK, {
    "x_block.attn.qkv": QKV, "context_block.attn.qkv": ADDED,
    "x_block.attn2.qkv": tuple(name.replace("attn.", "attn2.") for name in QKV)})}  # fmt: skip


def published(state) -> dict[str, torch.Tensor]:
    """A transformer in the names of its own code, shifts before scales."""
    is_flux = "x_embedder.weight" in state
    top, blocks = (FLUX_TOP, FLUX_BLOCKS) if is_flux else (SD3_TOP, SD3_BLOCKS)
    pairs = {old: (new,) for new, old in top.items()}
    for (theirs, ours), (layers, joined) in blocks.items():
        for number in range(3):
            named = {old: (new,) for new, old in layers.items()} | joined
            pairs |= {f"{theirs}.{number}.{old}": tuple(f"{ours}.{number}.{new}" for new in news)
                      for old, news in named.items()}  # fmt: skip
    made = {} if is_flux else {"pos_embed": state["pos_embed.pos_embed"]}
    turned = ["norm_out.linear"] + (["transformer_blocks.2.norm1_context.linear"] if not is_flux else [])
    for old, news in pairs.items():
        for leaf in ("weight", "bias"):
            if f"{news[0]}.{leaf}" in state:
                rows = torch.cat([state[f"{new}.{leaf}"] for new in news])
                rows = torch.cat(rows.chunk(2)[::-1]) if news[0] in turned else rows
                made[f"{old}.{'scale' if is_flux and 'norm' in old else leaf}"] = rows.contiguous()
    return made


def unpublished(meant, state) -> dict[str, torch.Tensor]:
    """What such a transformer stands for, by the names and in the shapes of `state`."""
    ids, count = {}, 0
    for name, tensor in state.items():
        ids[name] = torch.arange(count, count := count + tensor.numel()).view(tensor.shape)
    flat = torch.empty(count)
    for name, places in published(ids).items():
        flat[places.flatten()] = meant[name].float().flatten()
    return {name: flat[places] for name, places in ids.items()}


def narrow(state, width) -> dict[str, torch.Tensor]:
    """Tensors of the same names, of so many rows for each of a layer's shares, and two columns."""
    draw, made = torch.Generator().manual_seed(0), {}
    for name, tensor in state.items():
        shares = 7 if "linear1" in name else 3 if "qkv" in name else 2 if "adaLN" in name else 1
        sides = (shares * width, 2)[: tensor.ndim] if tensor.ndim < 3 else (1, 4, 2)
        made[name] = torch.randn(sides, generator=draw)
    return made


@pytest.mark.parametrize(
    ("family", "width", "converter"),
    [
        ("flux1-dev", 3072, "convert_flux_transformer_checkpoint_to_diffusers"),  # the one that it knows
        ("sd3", 8, "convert_sd3_transformer_checkpoint_to_diffusers"),
    ],
)
def test_names_are_diffusers(family, width, converter, folder_of, tmp_path):
    from diffusers.loaders import single_file_utils

    state = narrow(published(parts_of(folder_of(family))["transformer"]), width)
    save_file({f"model.diffusion_model.{n}": t for n, t in state.items()}, file := tmp_path / "m.safetensors")
    meant = getattr(single_file_utils, converter)(dict(state))
    named = transformer(read_file(file)[0])
    assert named.keys() == meant.keys()
    assert all(torch.equal(values(named[name]), tensor) for name, tensor in meant.items())


# ------------------------------------------------------------------------------------------- models


def tiny(family) -> dict:
    """With what no shape tells as published: CLIP's vocabulary, and the shares of widths."""
    made = dict(random_model.TINY[family])
    clip = {"num_attention_heads": 1, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 49408,
            "bos_token_id": 49406, "eos_token_id": 49407}  # fmt: skip
    widths = {"text_encoder": 24, "text_encoder_2": 40} if family == "sd3" else {"text_encoder": 32}
    made |= {name: clip | {"hidden_size": width, "projection_dim": width} for name, width in widths.items()}
    made["vae"] = made["vae"] | {"block_out_channels": (32, 32, 64, 64), "norm_num_groups": 32}
    if family != "sd3":
        heads = {"attention_head_dim": 32, "num_attention_heads": 2, "axes_dims_rope": (4, 14, 14)}
        made["transformer"] = made["transformer"] | heads
    return made


def write_folder(place, family) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(random_model.TINY, family, tiny(family))
        merges = vocabulary.clip_merges()
        random_model.write(family, place, tiny=True, precision="fp32", merges=merges)
    if family == "sd3":  # whose projection is none
        file = place / "text_encoder/model.safetensors"
        save_file(load_file(file) | {"text_projection.weight": torch.eye(24)}, file)


@pytest.fixture(scope="module")
def folder_of(made_once):
    return lambda family: made_once(f"models/{family}-32", lambda place: write_folder(place, family))


def parts_of(folder) -> dict[str, dict[str, torch.Tensor]]:
    files = {file.parent.name: file for file in folder.glob("*/*.safetensors")}
    return {name: load_file(file) for name, file in files.items()}


def published_parts(folder) -> dict[str, dict[str, torch.Tensor]]:
    """Each network as its own file has it."""
    parts = parts_of(folder)
    made = parts | {
        "transformer": published(parts["transformer"]),
        "vae": SPLIT["published_vae"](parts["vae"]),
    }
    made["text_encoder"] = {n: t for n, t in parts["text_encoder"].items() if "projection" not in n}
    return made


def write_comfy(models, folder, family, written=lambda state: state) -> Path:
    """The folder `models` of ComfyUI with a file for each network. The denoiser's is answered."""
    for part, state in published_parts(folder).items():
        file = models / SHELVES[part] / f"{NAMES[family][part]}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(written(state) if part == "transformer" else state, file)
    shutil.copytree(folder / tokenizer_of(family), models / "text_encoders/t5xxl_fp16")
    return file_of(models, family, "transformer")


def file_of(models, family, part) -> Path:
    return models / SHELVES[part] / f"{NAMES[family][part]}.safetensors"


def tokenizer_of(family) -> str:
    return T5[family].replace("text_encoder", "tokenizer")


@pytest.fixture(scope="module")
def comfy_of(folder_of, made_once):
    def write(family):
        return lambda models: write_comfy(models, folder_of(family), family)

    return lambda family: made_once(f"comfy/{family}", write(family))


def check_values(component, meant) -> None:
    for name, tensor in component.tensors.items():
        torch.testing.assert_close(values(tensor).flatten(), meant[name].float().flatten(), rtol=0, atol=0)


def test_a_folder_that_a_command_names_has_the_other_files(comfy_of, tmp_path, monkeypatch):
    """Also for a denoiser that lies elsewhere."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("TIGHTFIT_MODELS", str(tmp_path / "empty"))
    models = comfy_of("flux1-schnell")
    file = shutil.copy(file_of(models, "flux1-schnell", "transformer"), tmp_path / "alone.safetensors")
    asked = ("plan", "--model", str(file), "--hardware", "gtx-1650", "--width", "64", "--height", "64")
    assert "--text-encoder FILE" in str(CliRunner().invoke(app(), asked).exception)
    done = CliRunner().invoke(app(), (*asked, "--models-dir", str(models)))
    assert done.exit_code == 0, done.exception or done.output


@pytest.mark.parametrize("family", NAMES)
def test_files_found_beside_are_the_model(family, comfy_of, folder_of):
    folder, file = folder_of(family), file_of(comfy_of(family), family, "transformer")
    spec, other, parts = tightfit.inspect(str(file)), tightfit.inspect(str(folder)), parts_of(folder)
    assert spec.family == other.family == family
    for name, component in spec.components.items():
        beside = other.components[name]
        assert component.tensors.keys() == beside.tensors.keys() - {"text_projection.weight"} | (
            {"text_projection.weight"} & component.tensors.keys()
        )
        check_values(component, parts[component.network.folder])
        known, wanted = (json.loads(json.dumps(one.config)) for one in (component, beside))
        unused = {"architectures", "sample_size", "max_position_embeddings"}
        for key in known.keys() & wanted.keys() - unused:
            assert wanted[key] in (known[key], None), key
    assert {k: v for k, v in other.scheduler.items() if k in spec.scheduler} == {
        k: v for k, v in spec.scheduler.items() if k in other.scheduler
    }
    assert spec.latent_affine == other.latent_affine
    if family != "flux1-dev":  # whose checkpoints paint below
        SPLIT["check_same"](painted(file, REQUEST), painted(folder, REQUEST))


@pytest.mark.parametrize("family", ["flux1-schnell", "sd3"])
def test_files_are_named_by_options(family, comfy_of, folder_of, tmp_path):
    comfy, folder = comfy_of(family), folder_of(family)
    files = {part: file_of(comfy, family, part) for part in NAMES[family]}
    alone = shutil.copy(files["transformer"], tmp_path / "alone.safetensors")
    with pytest.raises(
        TightfitError,
        match=r"a CLIP-L \d\d wide \(such as clip_l.*--text-encoder FILE; .* 16 channels .*--vae",
    ) as error:
        REQUEST.resolve(tightfit.inspect(str(alone)))
    assert "\n" not in str(error.value)
    texts = [str(file) for part, file in files.items() if part.startswith("text_encoder")]
    named = adapters.written({"text_encoder": texts, "vae": [str(files["vae"])]})
    over = adapters.written({"text_encoder": texts, "vae": [str(files["vae"])],
                             "unet": [str(files["transformer"])]})  # fmt: skip
    for model, beside in ((alone, named), (folder, over)):
        spec = replace(REQUEST, adapters=beside).resolve(tightfit.inspect(str(model))).spec
        assert (spec.family, len(spec.text_encoders)) == (family, len(texts))  # sd3 alone is without T5
        own = {alone} if model == alone else {files["transformer"]}
        assert {c.folder for c in spec.components.values()} == {*files.values()} - {
            files["transformer"]
        } | own


def test_an_export_is_that_of_the_folder(comfy_of, folder_of, tmp_path):
    """Of names in folders of models, some of networks that were named by themselves."""
    named = ["--models-dir", str(comfy_of("sd3")), "--text-encoder", "clip_g", "--vae", "sd3_vae"]
    split = ["export", "sd3.5_medium", *named, "--precision", "int8", "-o", str(tmp_path / "split")]
    CliRunner().invoke(app(), split, catch_exceptions=False)
    made = tmp_path / "split", tightfit.export_model(str(folder_of("sd3")), tmp_path / "whole", "int8")
    for part in ("text_encoder_2", "text_encoder_3", "transformer", "vae"):
        one, other = (load_file(next((out / part).glob("*.safetensors"))) for out in made)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    check = [tightfit.inspect(str(out)) for out in made]
    assert check[0].family == "sd3"
    assert REQUEST.resolve(check[0]).prompting.encodings == REQUEST.resolve(check[1]).prompting.encodings


def in_parts(folder, name, into) -> Path:
    """One network's weights in two files, with an index, as diffusers and transformers write large ones."""
    into.mkdir(parents=True)
    state, places = load_file(folder / f"{name}.safetensors"), {}
    for number, keys in enumerate((sorted(state)[::2], sorted(state)[1::2]), 1):
        part = f"{name}-{number:05}-of-00002.safetensors"
        save_file({key: state[key] for key in keys}, into / part)
        places |= dict.fromkeys(keys, part)
    index = into / f"{name}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return index


@pytest.mark.parametrize("family", ["flux1-dev", "sd3"])
def test_diffusers_names_are_read_in_parts_too(family, comfy_of, folder_of, tmp_path):
    """By the folder, its index and each of its files; T5 by its folder, with the tokenizer beside that."""
    shutil.copytree(comfy_of(family), models := tmp_path / "models")
    for part in ("transformer", T5[family]):
        file_of(models, family, part).unlink()
    folder, meant = folder_of(family), parts_of(folder_of(family))
    unet = models / "diffusion_models" / "mine"
    index = in_parts(folder / "transformer", "diffusion_pytorch_model", unet)
    texts = tmp_path / "repo" / T5[family]
    in_parts(folder / T5[family], "model", texts)
    shutil.copytree(folder / tokenizer_of(family), tmp_path / "repo" / tokenizer_of(family))
    named, over = given(text_encoder=texts), given(unet=unet)
    for model in (unet, index, unet / "diffusion_pytorch_model-00002-of-00002.safetensors"):
        spec = replace(REQUEST, adapters=named).resolve(tightfit.inspect(str(model))).spec
        assert (spec.family, spec.denoiser.tensors.keys()) == (family, meant["transformer"].keys())
    check_values(spec.denoiser, meant["transformer"])
    check_values(spec.text_encoders[-1], meant[T5[family]])
    with described_folder(spec) as made:
        assert (made / "model_index.json").is_file()
    spec = replace(REQUEST, adapters=over).resolve(tightfit.inspect(str(folder))).spec
    assert spec.denoiser.folder == index


def test_others_with_such_names_are_not_taken_for_them():
    """diffusers' own classes, of one block of each kind."""
    import diffusers

    layers = {"num_layers": 1}
    both = layers | {"num_single_layers": 1}
    others = {
        "HunyuanVideoTransformer3DModel": both | {"num_refiner_layers": 1},
        "ChromaTransformer2DModel": both,
        "BriaTransformer2DModel": both,
        "FluxControlNetModel": both,
        "SD3ControlNetModel": layers,
        "AuraFlowTransformer2DModel": {"num_mmdit_layers": 1, "num_single_dit_layers": 1},
    }
    ours = {"FluxTransformer2DModel": both, "SD3Transformer2DModel": layers}
    taken = []
    for kind, config in (others | ours).items():
        with torch.device("meta"):
            state = getattr(diffusers, kind)(**config).state_dict()
        tensors = {name: Tensor("F32", tuple(value.shape), Path("x"), 0, 0) for name, value in state.items()}
        taken += [kind for _ in told(tensors)]
    assert taken == [*ours]


def test_sd3_paints_without_its_t5_if_asked(folder_of, folders, comfy_of):
    whole, named = tightfit.inspect(str(folder_of("sd3"))), given(text_encoder="none")
    spec = replace(REQUEST, adapters=named).resolve(whole).spec
    assert (spec.family, len(spec.text_encoders)) == ("sd3-without-t5", 2)
    assert replace(REQUEST, adapters=named).resolve(spec).spec.family == spec.family
    clip = given(text_encoder=file_of(comfy_of("sd3"), "sd3", "text_encoder"))
    assert len(replace(REQUEST, adapters=(*clip, *named)).resolve(whole).spec.text_encoders) == 2
    text = infotext.write(replace(REQUEST, adapters=named).resolve(whole), "sd3", "fp32")
    assert infotext.parse(text, "it").request["adapters"] == named
    with pytest.raises(TightfitError, match="needs all of its text encoders: leave --text-encoder none out"):
        replace(REQUEST, adapters=named).resolve(tightfit.inspect(str(folder_of("flux1-dev"))))
    with pytest.raises(TightfitError, match=r"--text-encoder"):
        replace(REQUEST, adapters=named).resolve(tightfit.inspect(str(folders["sd1"])))


def test_sd3_without_t5_is_that_and_says_so(comfy_of, tmp_path):
    shutil.copytree(comfy_of("sd3"), models := tmp_path / "models")
    t5 = file_of(models, "sd3", "text_encoder_3")
    wide = load_file(t5)
    wide["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"] = torch.zeros(32, 4)
    t5.unlink()
    save_file(wide, t5.with_name("umt5_xxl_fp16.safetensors"))  # Wan's
    spec = tightfit.inspect(str(file_of(models, "sd3", "transformer")))
    assert (spec.family, len(spec.text_encoders)) == ("sd3-without-t5", 2)
    assert any("needs a T5 128 wide" in note and "else it paints without" in note for note in spec.notes)
    with described_folder(spec) as folder:
        index = json.loads((folder / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]  # as diffusers wants it


@pytest.mark.parametrize(
    ("family", "change", "why"),
    [
        ("sd3", lambda t5: shutil.copy(t5, t5.with_name("t5xxl_fp8.safetensors")), "are both for"),
        (
            "flux1-dev",
            lambda t5: shutil.rmtree(t5.with_suffix("")),
            r"has no tokenizer beside it: put tokeni",
        ),
        ("flux1-dev", lambda t5: t5.write_bytes(t5.read_bytes()[:-1]), r"a T5 128 wide.*truncated"),
    ],
)
def test_what_is_missing_is_one_line(family, change, why, comfy_of, tmp_path):
    shutil.copytree(comfy_of(family), models := tmp_path / "models")
    change(file_of(models, family, T5[family]))
    with pytest.raises(TightfitError, match=why) as error:
        REQUEST.resolve(tightfit.inspect(str(file_of(models, family, "transformer"))))
    assert "\n" not in str(error.value)


def test_text_encoders_of_other_kinds_are_refused(comfy_of, folder_of, folders, tmp_path):
    """folders: SD 1.x's have one of their own."""
    comfy = comfy_of("sd3")
    wide = file_of(comfy, "sd3", "text_encoder_2")
    for model, why in ((folder_of("flux1-dev"), "is a CLIP-L 40 wide, and .* one 32 wide"),
                       (folders["sd1"], "reads texts by CLIP")):  # fmt: skip
        with pytest.raises(TightfitError, match=why):
            replace(REQUEST, adapters=given(text_encoder=wide)).resolve(tightfit.inspect(str(model)))
    bare = {name: tensor for name, tensor in load_file(wide).items() if "projection" not in name}
    save_file(bare, file := tmp_path / "clip_h.safetensors")
    with pytest.raises(TightfitError, match=r"is a CLIP-L 40 wide, and .* one 24 wide"):
        replace(REQUEST, adapters=given(text_encoder=file)).resolve(tightfit.inspect(str(folder_of("sd3"))))
    with pytest.raises(TightfitError, match="holds no CLIP-L or T5"):
        replace(REQUEST, adapters=given(text_encoder=file_of(comfy, "sd3", "vae"))).resolve(
            tightfit.inspect(str(folder_of("flux1-dev")))
        )


def test_a_transformer_without_second_attentions_is_refused_by_them(comfy_of, folder_of, tmp_path):
    """SD 3 Medium's over SD 3.5's: no texts go through them."""
    stored = load_file(file_of(comfy_of("sd3"), "sd3", "transformer"))
    kept = {name: tensor for name, tensor in stored.items() if "attn2" not in name}
    save_file(kept, file := tmp_path / "sd3_medium.safetensors")
    with pytest.raises(TightfitError, match=r"sd3_medium.safetensors has \S+\.attn2\.\S+ nowhere"):
        replace(REQUEST, adapters=given(unet=file)).resolve(tightfit.inspect(str(folder_of("sd3"))))


def test_anothers_transformer_is_called_so(comfy_of, folder_of, tiny_models):
    sd3 = file_of(comfy_of("sd3"), "sd3", "transformer")
    for model, title in ((folder_of("flux1-dev"), "Flux.1"), (tiny_models["sd1"], "SD 1.x")):
        said = rf"is of a StableDiffusion3Pipeline, and .* is {title}: name one of its kind"
        with pytest.raises(TightfitError, match=said):
            replace(REQUEST, adapters=given(unet=sd3)).resolve(tightfit.inspect(str(model)))


def test_guidance_is_of_one_kind_alone(comfy_of, folder_of):
    """dev's is more than schnell's."""
    dev = file_of(comfy_of("flux1-dev"), "flux1-dev", "transformer")
    with pytest.raises(TightfitError, match=r"has time_text_embed\.guidance_embedder\.\S+, and .* none"):
        replace(REQUEST, adapters=given(unet=dev)).resolve(tightfit.inspect(str(folder_of("flux1-schnell"))))


def test_a_list_says_what_files_are(comfy_of):
    kinds = {}
    for family in ("flux1-dev", "sd3"):
        entries = library.scan([comfy_of(family)]).entries
        kinds |= {entry.path.stem: (model.kind, model.family) for entry in entries
                  if (model := described(entry))}  # fmt: skip
    assert kinds == {"flux1-dev": ("checkpoint", "Flux.1"), "sd3.5_medium": ("checkpoint", "SD 3.5"),
                     **dict.fromkeys(("clip_l", "clip_g", "t5xxl_fp16"), ("text encoder", "")),
                     **dict.fromkeys(("ae", "sd3_vae"), ("VAE", ""))}  # fmt: skip


# --------------------------------------------------------------------------------- all in one, and GGUF

BITSANDBYTES = runpy.run_path(str(Path(__file__).with_name("test_bitsandbytes.py")))  # its writer
COMFY = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def in_nf4(state) -> tuple[dict, dict]:
    layers = [name.removesuffix(".weight") for name in state if "blocks" in name and state[name].ndim == 2]
    stored, means = BITSANDBYTES["quantised"](state, "nf4", layers)
    return stored, state | means


def in_fp8_alone(state) -> tuple[dict, dict]:
    """Without scales, norms and biases too."""
    stored = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}
    return stored, {name: tensor.float() for name, tensor in stored.items()}


def in_one(folder, family, written, texts, before_vae) -> tuple[dict, dict]:
    """All networks in one file; what each stands for, by diffusers' names."""
    stored, meant, plain = {}, {}, parts_of(folder)
    for part, state in published_parts(folder).items():
        name = "t5xxl" if part == T5[family] else COMFY.get(part)
        way = texts if part == T5[family] else written if part == "transformer" else SPLIT["in_bf16"]
        made, meant[part] = way(state)
        before = {"transformer": "model.diffusion_model.", "vae": before_vae}.get(
            part, f"text_encoders.{name}.transformer."
        )
        stored |= {f"{before}{key}": tensor for key, tensor in made.items()}
    meant["transformer"] = unpublished(meant["transformer"], plain["transformer"])
    meant["vae"] = SPLIT["in_bf16"](plain["vae"])[1]
    stored["text_encoders.clip_l.transformer.text_projection.weight"] = torch.zeros(8, 8)  # which is not read
    stored["text_encoders.clip_l.logit_scale"] = torch.ones(())
    return stored, meant


@pytest.mark.parametrize(
    ("family", "written", "texts", "before_vae"),
    [
        ("flux1-dev", in_fp8_alone, SPLIT["in_bf16"], "vae."),  # Comfy-Org's
        ("flux1-dev", in_nf4, in_fp8_alone, "vae."),  # lllyasviel's
        ("sd3", SPLIT["in_bf16"], SPLIT["in_fp8"], "first_stage_model."),  # Comfy-Org's with clips and T5
    ],
)
def test_a_checkpoint_with_all_inside_is_the_model(
    family, written, texts, before_vae, folder_of, tmp_path, monkeypatch, check_predicted
):
    folder = folder_of(family)
    stored, meant = in_one(folder, family, written, texts, before_vae)
    save_file(stored, file := tmp_path / "all.safetensors")
    with pytest.raises(TightfitError, match=r"all\.safetensors has no tokenizer beside it"):
        REQUEST.resolve(tightfit.inspect(str(file)))
    shutil.copytree(folder / tokenizer_of(family), tmp_path / "t5_tokenizer")
    with monkeypatch.context() as patch:
        patch.setattr(split_file, "near", None)  # no folder is looked through
        spec = tightfit.inspect(str(file))
    assert (spec.family, [len(c.tensors) > 0 for c in spec.components.values()]) == (
        family, [True] * len(NAMES[family]))  # fmt: skip
    for component in spec.components.values():
        check_values(component, meant[component.network.folder])
    check_predicted(painted(file, REQUEST))


PLAIN = "relative_attention_bias", "pos_embed", "x_embedder"  # which stay as they are


def denoiser_gguf(folder, file, kind, arch="flux") -> dict[str, torch.Tensor]:
    state = parts_of(folder)["transformer"]
    return unpublished(SPLIT["in_gguf"](published(state), file, kind, arch=arch, plain=PLAIN), state)


def pieces_gguf(state, file) -> None:
    """With the tokenizer of tiny models, as llama.cpp writes it."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 24)
    writer = gguf.GGUFWriter(str(file), "t5encoder")
    writer.add_tokenizer_model("t5")
    writer.add_token_list([piece for piece, _ in vocabulary._T5_LETTERS])
    writer.add_token_scores([score for _, score in vocabulary._T5_LETTERS])
    writer.add_token_types([1] * len(vocabulary._T5_LETTERS))
    for name, tensor in state.items():
        writer.add_tensor(names.get_name(name, (".weight",)) or "", tensor.numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def t5_gguf(state, file, kind) -> dict[str, torch.Tensor]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 24)
    return SPLIT["in_gguf"](
        state, file, kind, lambda name: names.get_name(name, (".weight",)), "t5encoder", PLAIN
    )


@pytest.mark.parametrize(("family", "arch"), [("flux1-dev", "flux"), ("sd3", "sd3")])
def test_gguf_is_read_as_what_it_stands_for(family, arch, folder_of, tmp_path):
    folder = folder_of(family)
    meant = denoiser_gguf(folder, tmp_path / "denoiser.gguf", "Q8_0", arch)
    texts = t5_gguf(parts_of(folder)[T5[family]], tmp_path / "t5.gguf", "Q8_0")
    named = given(unet=tmp_path / "denoiser.gguf", text_encoder=tmp_path / "t5.gguf")
    clip = published_parts(folder)["text_encoder"]  # stable-diffusion.cpp keeps the names of a file
    clip = SPLIT["in_gguf"](clip, tmp_path / "clip_l.gguf", "Q8_0", plain=("position",))
    named += given(text_encoder=tmp_path / "clip_l.gguf")
    spec = replace(REQUEST, adapters=named).resolve(tightfit.inspect(str(folder))).spec
    check_values(spec.text_encoders[0], clip)
    check_values(spec.denoiser, meant)
    check_values(spec.text_encoders[-1], texts)
    if family == "flux1-dev":  # layers keep these codes, of parts of joined tensors too
        assert spec.denoiser.tensors["single_transformer_blocks.1.proj_mlp.weight"].form == "int8-b32"


def test_a_t5_in_gguf_brings_its_tokenizer(comfy_of, folder_of, tmp_path):
    shutil.copytree(comfy_of("flux1-schnell"), models := tmp_path / "models")
    t5 = file_of(models, "flux1-schnell", "text_encoder_2")
    shutil.rmtree(t5.with_suffix(""))
    state = load_file(t5)
    t5.unlink()
    pieces_gguf(state, gguf_file := t5.with_suffix(".gguf"))
    spec, whole = (tightfit.inspect(str(one)) for one in (
        file_of(models, "flux1-schnell", "transformer"), folder_of("flux1-schnell")))  # fmt: skip
    assert spec.text_encoders[1].tokenizer == gguf_file
    rows = [REQUEST.resolve(one).prompting.rows["text_encoder_2"][0].tolist() for one in (spec, whole)]
    assert rows[0] == rows[1]


def test_clip_is_read_in_open_clips_names(folder_of, tmp_path):
    named = runpy.run_path(str(Path(__file__).with_name("conftest.py")))["open_clip"]
    state = parts_of(folder_of("sd3"))["text_encoder_2"]
    theirs = {name: tensor.contiguous() for name, tensor in named(state, "").items()}
    save_file(theirs, file := tmp_path / "open_clip_g.safetensors")
    named = given(text_encoder=file)
    spec = replace(REQUEST, adapters=named).resolve(tightfit.inspect(str(folder_of("sd3")))).spec
    assert spec.text_encoders[1].folder == file
    check_values(spec.text_encoders[1], state)


def test_tables_of_places_are_read(folder_of, tmp_path):
    """In fp8, and without the side of 1 that stable-diffusion.cpp drops."""
    tensors = read_file(next((folder_of("sd3") / "transformer").glob("*.safetensors")))[0]
    table = tensors["pos_embed.pos_embed"]
    own = {"joint_blocks.0.x_block.attn.qkv.weight": replace(table, shape=(3, 4), stored_bytes=48)}
    named = transformer(own | {"pos_embed": replace(table, shape=table.shape[1:])})
    assert named["pos_embed.pos_embed"] == table
    rough = torch.randn(2, 8).to(torch.float8_e4m3fn)
    save_file({"table": rough}, file := tmp_path / "table.safetensors")
    assert read_file(file)[0]["table"].floats(3, 9).tolist() == rough.flatten()[3:12].float().tolist()
