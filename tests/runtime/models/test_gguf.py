"""GGUF files, written here by ggml's own package as ComfyUI-GGUF and stable-diffusion.cpp write them: values
against its decoding and one of the test's own in fp64, and pictures against diffusers'."""

from __future__ import annotations

import math
import random
import re
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import tightfit
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from tightfit.kernels import formats
from tightfit.runtime import adapters
from tightfit.runtime.backends.torch import loading, networks
from tightfit.runtime.backends.torch.quantised import quantised_layers
from tightfit.runtime.catalogue import described
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models.layouts import gguf as ours
from tightfit.runtime.models.layouts import library, single_file
from tightfit.runtime.models.layouts.safetensors import read_header
from tightfit.runtime.placement import Placement
from tightfit.runtime.planner.estimate import encodings

KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
KEPT = {"Q8_0": "int8-b32", "Q5_0": "int8-b32", "Q4_0": "int4-b32", "Q4_1": "int4-min-b32"}
# Of types that gguf does not write: where a block has its fp16 numbers, and what makes their values near 1.
NUMBERS = {
    "Q2_K": {80: 0.08, 82: 0.1},
    "Q3_K": {108: 0.02},
    "Q4_K": {0: 0.004, 2: 0.03},
    "Q5_K": {0: 0.002, 2: 0.03},
    "Q6_K": {208: 0.0007},
}
SIZE = {"width": 32, "height": 32, "num_inference_steps": 2, "seed": 3}


def encoded(weight: np.ndarray, kind: str) -> np.ndarray:
    """The blocks of a weight; of types that gguf does not write, random ones of values as large."""
    if kind not in NUMBERS:
        return quantize(weight, Type[kind])
    values, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    draw = np.random.default_rng(weight.size)
    blocks = draw.integers(0, 256, (weight.size // values, size), np.uint8)
    for at, number in NUMBERS[kind].items():
        drawn = number * weight.std() * draw.uniform(0.5, 1.5, (len(blocks), 1))
        blocks[:, at : at + 2] = drawn.astype(np.float16).view(np.uint8)
    return blocks.reshape(*weight.shape[:-1], -1)


def written(file: Path, state: dict[str, torch.Tensor], kind: str, comfy: bool = False) -> dict:
    """Write the tensors as one of the two programs does; what they then stand for, in fp32."""
    writer = gguf.GGUFWriter(str(file), "sd1")
    if not comfy:
        del writer.kv_data[0]["general.architecture"]
    start, meant = "model.diffusion_model.", {}
    for name, tensor in state.items():
        if comfy and not name.startswith(start):
            continue
        data, stored = tensor.float().numpy(), name.removeprefix(start) if comfy else name
        if comfy and data.ndim > 1 and data.size % 256 == 0 and data.shape[-1] % 256:
            writer.add_array(f"comfy.gguf.orig_shape.{stored}", list(data.shape))
            data = data.reshape(-1, 256)
        if data.ndim < 2:
            writer.add_tensor(stored, data)
            meant[name] = tensor.float()
            continue
        block, _ = gguf.GGML_QUANT_SIZES[Type[kind]]
        plain = any(word in name for word in ("embed", "label_emb", "betas"))
        if data.shape[-1] % block or (plain and not comfy):
            writer.add_tensor(stored, data.astype(np.float16))
            meant[name] = tensor.half().float()
        else:
            blocks = encoded(data, kind)
            writer.add_tensor(stored, blocks, raw_dtype=Type[kind])
            meant[name] = torch.from_numpy(dequantize(blocks, Type[kind])).view(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def values(tensor) -> torch.Tensor:
    out = torch.empty(tensor.shape)
    loading.read_into(out, tensor, torch.empty(tensor.stored_bytes, dtype=torch.uint8))
    return out


# -------------------------------------------------------------------------- values


def by_hand(block: bytes, kind: str) -> list[float]:
    """The values of one block by ggml's description of its types."""

    def half(at: int) -> float:
        return struct.unpack("<e", block[at : at + 2])[0]

    def nibbles(at: int, count: int) -> list[int]:
        return [byte & 15 for byte in block[at : at + count]] + [byte >> 4 for byte in block[at : at + count]]

    if kind == "Q8_0":
        return [half(0) * code for code in struct.unpack("<32b", block[2:])]
    if kind == "Q4_0":
        return [half(0) * (code - 8) for code in nibbles(2, 16)]
    if kind == "Q4_1":
        return [half(0) * code + half(2) for code in nibbles(4, 16)]
    if kind == "Q5_0":
        high = int.from_bytes(block[2:6], "little")
        return [half(0) * ((code | (high >> i & 1) << 4) - 16) for i, code in enumerate(nibbles(6, 16))]
    if kind == "Q4_K":
        made = []
        for group in range(8):
            low, high = block[4 + group % 4], block[8 + group % 4]
            if group < 4:
                scale, least = low & 63, high & 63
            else:
                both = block[12 + group - 4]
                scale, least = both & 15 | low >> 6 << 4, both >> 4 | high >> 6 << 4
            codes = nibbles(16 + group // 2 * 32, 32)[group % 2 * 32 :][:32]
            made += [half(0) * scale * code - half(2) * least for code in codes]
        return made
    assert kind == "Q6_K"
    made = []
    for value in range(256):
        part, at = divmod(value, 128)
        quarter, place = divmod(at, 32)
        low = block[64 * part + 32 * (quarter % 2) + place]
        low = low >> 4 if quarter > 1 else low & 15
        high = block[128 + 32 * part + place] >> 2 * quarter & 3
        scale = struct.unpack("b", block[192 + value // 16 : 193 + value // 16])[0]
        made.append(half(208) * scale * ((low | high << 4) - 32))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_every_value(kind, tmp_path, monkeypatch):
    """A matrix, and convolutions whose blocks begin in one row and end in the next, some rows at a time."""
    block, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    assert ours._BLOCKS[Type[kind].value] == (kind, block, size)
    torch.manual_seed(4)
    state = {"m.weight": torch.randn(48, 512), "c.weight": torch.randn(32, 24, 3, 3)}
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    meant = written(tmp_path / "a.gguf", state, kind, comfy=True)
    tensors, _ = ours.read_file(tmp_path / "a.gguf")
    for most in (2**18, 1000):
        monkeypatch.setattr(loading, "BLOCK", most)
        for name, expected in meant.items():
            tensor = tensors[name.removeprefix("model.diffusion_model.")]
            assert (tensor.dtype, tensor.shape) == (kind, tuple(expected.shape))
            assert torch.equal(values(tensor), expected)
    tensor = tensors["m.weight"]
    raw = (tmp_path / "a.gguf").read_bytes()[tensor.offset : tensor.offset + tensor.stored_bytes]
    if kind in (*KEPT, "Q4_K", "Q6_K"):
        exact = [by_hand(raw[at : at + size], kind) for at in range(0, len(raw), size)]
        exact = torch.tensor(exact, dtype=torch.float64).view(48, 512)
        torch.testing.assert_close(values(tensor).double(), exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_that_are_kept(kind, tmp_path):
    """In our formats they have the same values; a row that is no whole blocks has none."""
    torch.manual_seed(5)
    shapes = {"m": (64, 512), "c": (64, 32, 3, 3), "p": (64, 32, 1, 1), "odd": (64, 12, 3, 3)}
    state = {f"model.diffusion_model.{n}.weight": torch.randn(shape) for n, shape in shapes.items()}
    meant = written(tmp_path / "a.gguf", state, kind, comfy=True)
    tensors, _ = ours.read_file(tmp_path / "a.gguf")
    assert {name: tensor.form for name, tensor in tensors.items()} == {
        f"{name}.weight": "" if name == "odd" else KEPT.get(kind, "") for name in shapes
    }
    for name in ("m", "c", "p") if kind in KEPT else ():
        tensor, form = tensors[f"{name}.weight"], formats.FORMATS[KEPT[kind]]
        raw = torch.empty(tensor.stored_bytes, dtype=torch.uint8)
        tensor.read_into(raw.numpy().data)
        parts = tensor.encoding.packed(raw, tensor.shape, ())
        raw.zero_()  # they are no views of it
        assert {part: (p.dtype, tuple(p.shape)) for part, p in parts.items()} == form.parts(tensor.shape)
        expected = meant[f"model.diffusion_model.{name}.weight"]
        assert torch.equal(formats.dequantise(parts, form, tensor.shape), expected)


def test_plain_types_and_other_numbers_of_sides(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "sd1")
    data = {"a": np.float32([[1, 2, 3]]), "b": np.float16([0.5]), "i": np.int64([7, 8])}
    for name, array in data.items():
        writer.add_tensor(name, array)
    bf16 = torch.randn(3, 32).bfloat16()
    writer.add_tensor("c", bf16.view(torch.uint8).numpy(), raw_dtype=Type.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors, words = ours.read_file(tmp_path / "a.gguf")
    assert words == {"general.architecture": "sd1"}
    assert [t.dtype for t in tensors.values()] == ["F32", "F16", "I64", "BF16"]
    assert torch.equal(values(tensors["a"]), torch.tensor([[1.0, 2, 3]]))
    assert torch.equal(values(tensors["b"]), torch.tensor([0.5]))
    assert torch.equal(values(tensors["c"]), bf16.float())


# -------------------------------------------------------------------------- whole models


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """Called with a family and a type: a checkpoint in GGUF, and one in safetensors of the same values."""
    folder, made = tmp_path_factory.mktemp("gguf"), {}

    def of(family: str, kind: str) -> tuple[Path, Path]:
        if (family, kind) not in made:
            one, other = (folder / f"{family}-{kind}.{end}" for end in ("gguf", "safetensors"))
            save_file(written(one, load_file(files[family]), kind), other)
            made[family, kind] = one, other
        return made[family, kind]

    return of


def painted(model: Path, **wishes) -> tightfit.Result:
    one_way = {"residency": "staged", "attention": "sdpa", "tiling": "whole"}  # so that little is planned
    with tightfit.load(str(model), device="cpu", **(one_way | wishes)) as pipeline:
        return pipeline.generate(tightfit.Request("a cat", guidance_scale=6.0, **SIZE))


def pixels(result: tightfit.Result) -> np.ndarray:
    return np.asarray(result.images[0], int)


def by_diffusers(family: str, file: Path, folder: Path) -> np.ndarray:
    import diffusers

    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    others = {} if family == "sdxl" else {"safety_checker": None}
    pipe = kind.from_single_file(file, config=str(folder), local_files_only=True, **others)
    pipe.set_progress_bar_config(disable=True)
    size = {name: value for name, value in SIZE.items() if name != "seed"}
    draw = torch.Generator().manual_seed(3)
    image = pipe("a cat", guidance_scale=6.0, output_type="np", generator=draw, **size).images[0]
    return (image * 255).round().astype(int)


@pytest.mark.parametrize(("family", "kind"), [("sd1", "Q8_0"), ("sd2", "Q4_1"), ("sdxl", "Q4_0")])
def test_pictures_are_diffusers_of_the_values(family, kind, whole, folders):
    file, plain = whole(family, kind)
    result = painted(file, precision="fp32", residency="staged")
    assert (pixels(result) == by_diffusers(family, plain, folders[family])).all()
    for stage, predicted in result.plan.predicted.stages.items():
        assert abs(result.stages[stage].peak_bytes - predicted) <= 0.05 * predicted, stage


@pytest.mark.parametrize("kind", ["Q4_K"])
def test_a_unet_as_comfyui_has_it(kind, files, folders, tmp_path):
    """Alone, its convolutions in rows of 256, in a type whose values are decoded; in fp32, bf16 and int8."""
    state = load_file(files["sd1"])
    meant = written(tmp_path / "unet.gguf", state, kind, comfy=True)
    save_file(state | meant, tmp_path / "plain.safetensors")
    with pytest.raises(TightfitError, match=r"unet.gguf is a U-Net alone.*--model MODEL --unet FILE"):
        tightfit.inspect(str(tmp_path / "unet.gguf"))
    unet = adapters.written({"unet": [str(tmp_path / "unet.gguf")]})
    for wishes in ({"precision": "fp32"}, {"precision": "int8", "compute": "fp32"}):
        one = painted(files["sd1"], adapters=unet, residency="staged", **wishes)
        other = painted(tmp_path / "plain.safetensors", residency="staged", **wishes)
        assert (pixels(one) == pixels(other)).all()
        assert one.plan.predicted.psnr == other.plan.predicted.psnr
    theirs = by_diffusers("sd1", tmp_path / "plain.safetensors", folders["sd1"])
    assert (pixels(painted(files["sd1"], adapters=unet, precision="fp32")) == theirs).all()


@pytest.mark.parametrize(
    ("kind", "precision"), [("Q8_0", "int8"), ("Q5_0", "int8"), ("Q4_0", "int4"), ("Q4_1", "int4")]
)
def test_layers_that_keep_codes_answer_as_diffusers(kind, precision, files, folders, tmp_path):
    """All of a U-Net's, in fp32: by linears and by convolutions whose rows are flat."""
    from diffusers import UNet2DConditionModel

    meant = written(tmp_path / "unet.gguf", load_file(files["sd1"]), kind, comfy=True)
    unet = adapters.written({"unet": [str(tmp_path / "unet.gguf")]})
    spec = adapters.adapted(tightfit.inspect(str(files["sd1"])), unet)
    placement = Placement("torch", precision, "fp32", "staged", "sdpa", "whole")
    ours = networks.build(spec.denoiser, placement, "cpu")
    layers = quantised_layers(ours)
    assert {layer.form for layer in layers.values()} == {formats.FORMATS[KEPT[kind]]}
    loading.fill(ours, loading.match(spec.denoiser, ours), torch.float32, torch.device("cpu"))
    theirs = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folders["sd1"] / "unet"))
    save_file(meant, tmp_path / "plain.safetensors")
    plain = single_file.denoiser(read_header(tmp_path / "plain.safetensors"))
    theirs.load_state_dict({name: values(tensor) for name, tensor in plain.items()})
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 16, 16), torch.tensor(500), torch.randn(2, 77, 64)
    with torch.inference_mode():
        expected, (answer, *_) = theirs(*inputs).sample, ours(*inputs, return_dict=False)
    torch.testing.assert_close(answer, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
def test_streamed_weights_are_decoded_in_each_pass(kind, whole):
    file, plain = whole("sd1", kind)
    one, other = (painted(model, precision="fp32", residency="streamed") for model in (file, plain))
    assert (pixels(one) == pixels(other)).all()
    for stage, predicted in one.plan.predicted.stages.items():
        assert abs(one.stages[stage].peak_bytes - predicted) <= 0.05 * predicted, stage


@pytest.mark.parametrize(("precision", "compute"), [("int8", "bf16"), ("int4", "fp32"), ("bf16", "bf16")])
def test_predicted_peaks(precision, compute, whole):
    result = painted(whole("sdxl", "Q4_0")[0], precision=precision, compute=compute, residency="staged")
    for stage, predicted in result.plan.predicted.stages.items():
        assert abs(result.stages[stage].peak_bytes - predicted) <= 0.05 * predicted, stage


def lora(file: Path, state: dict[str, torch.Tensor]) -> tuple:
    """One in kohya's names, of a linear and of a convolution, as an adapter; and what it adds."""
    torch.manual_seed(6)
    stored, added, start = {}, {}, "model.diffusion_model."
    for layer in ("input_blocks.1.1.transformer_blocks.0.attn1.to_q", "input_blocks.1.0.in_layers.2"):
        weight = state[f"{start}{layer}.weight"]
        up, down = torch.randn(weight.shape[0], 4), torch.randn(4, *weight.shape[1:]) / 100
        key = f"lora_unet_{layer.replace('.', '_')}"
        stored[f"{key}.lora_up.weight"] = up.view(*up.shape, *[1] * (weight.ndim - 2))
        stored |= {f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(4.0)}
        added[f"{start}{layer}.weight"] = (up @ down.flatten(1)).view(weight.shape)
    save_file(stored, file)
    return adapters.written({"lora": [str(file)]}), added


def test_a_lora_on_plain_and_on_kept_weights(files, tmp_path):
    """Merged while values are decoded, or beside codes that stay as they are."""
    state = load_file(files["sd1"])
    made, added = lora(tmp_path / "lora.safetensors", state)
    meant = written(tmp_path / "unet.gguf", state, "Q8_0", comfy=True)
    changed = {name: meant[name] + change for name, change in added.items()}
    save_file(state | meant | changed, tmp_path / "merged.safetensors")
    save_file(state | meant, tmp_path / "without.safetensors")
    unet = adapters.written({"unet": [str(tmp_path / "unet.gguf")]})
    right, without = (
        pixels(painted(tmp_path / f"{name}.safetensors", precision="fp32")) for name in ("merged", "without")
    )
    assert np.abs(pixels(painted(files["sd1"], adapters=(*unet, *made), precision="fp32")) - right).max() <= 1
    kept = painted(files["sd1"], adapters=(*unet, *made), precision="int8", compute="fp32")
    assert np.abs(right - without).mean() > 5 * np.abs(pixels(kept) - right).mean()


def test_an_export_has_the_values(whole, tmp_path):
    made = [tightfit.export_model(file, tmp_path / file.suffix[1:], "int8") for file in whole("sd1", "Q4_0")]
    one, other = (load_file(folder / "unet/diffusion_pytorch_model.safetensors") for folder in made)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# -------------------------------------------------------------------------- what stable-diffusion.cpp renames


def test_names_as_stable_diffusion_cpp_renames_them(files, folders, tmp_path):
    """SDXL's second encoder: queries, keys and values in one tensor, and a projection that is transposed."""
    state, inside = load_file(files["sdxl"]), "conditioner.embedders.1.model."
    second = load_file(folders["sdxl"] / "text_encoder_2/model.safetensors")
    kept = {n: t for n, t in state.items() if not n.startswith(inside)}
    start, renamed = "cond_stage_model.1.transformer.", {}
    for name, tensor in second.items():
        layer, query, leaf = name.partition(".q_proj.")
        if name == "text_projection.weight":
            renamed["text_model.text_projection"] = tensor.T.contiguous()
        elif query:
            parts = [second[f"{layer}.{part}_proj.{leaf}"] for part in "qkv"]
            renamed[f"{layer}.in_proj.{leaf}"] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            renamed[name] = tensor
    written(tmp_path / "a.gguf", kept | {start + name: t for name, t in renamed.items()}, "F32")
    tensors = tightfit.inspect(str(tmp_path / "a.gguf")).components["text_encoder_2"].tensors
    assert tensors.keys() == second.keys()
    for name, tensor in tensors.items():  # some were written in 16 bits
        torch.testing.assert_close(values(tensor), second[name], rtol=1e-3, atol=1e-6)


def test_a_folder_as_comfyui_has_it(files, tmp_path):
    folder = tmp_path / "models/diffusion_models"
    folder.mkdir(parents=True)
    written(folder / "toy.gguf", load_file(files["sd1"]), "Q8_0", comfy=True)
    entry, *others = library.scan([tmp_path]).entries
    assert (entry.name, entry.shelf, others) == ("toy", library.Kind.UNET, [])
    model = described(entry)
    assert (model.kind, model.problem) == ("U-Net", "")
    (unet,) = adapters.written({"unet": ["toy"]}, [tmp_path])
    assert unet.name == str(folder / "toy.gguf")


def test_what_a_plan_says(whole):
    spec = tightfit.inspect(str(whole("sd1", "Q8_0")[0]))
    lines = {}
    for precision in ("fp32", "int8", "int4"):
        placement = Placement("torch", precision, "fp32", "staged", "sdpa", "whole")
        lines[precision] = encodings(spec, {"unet": placement})
    (line,) = lines["fp32"]
    assert re.fullmatch(r"unet: \d+ weights in Q8_0, decoded", line)
    assert any(line.endswith("weights in Q8_0, kept as they are") for line in lines["int8"])
    assert any(line.endswith("weights in Q8_0, decoded and quantised again") for line in lines["int4"])


def test_sd2_with_projections_that_were_made_convolutions(files, tmp_path, monkeypatch):
    """By older versions; the family is then told by the width of texts, which is another in this model."""
    state = load_file(files["sd2"])
    pixels = {
        n: t[:, :, None, None] for n, t in state.items() if n.endswith(("proj_in.weight", "proj_out.weight"))
    }
    written(tmp_path / "a.gguf", state | {n: t for n, t in pixels.items() if "diffusion" in n}, "Q8_0")
    monkeypatch.setattr(single_file, "_SD2_TEXTS", 64)
    spec = tightfit.inspect(str(tmp_path / "a.gguf"))
    assert (spec.family, spec.unet["use_linear_projection"]) == ("sd2", True)
    placement = Placement("torch", "fp32", "fp32", "staged", "sdpa", "whole")
    loading.match(spec.denoiser, networks.build(spec.denoiser, placement, "cpu"))


# -------------------------------------------------------------------------- what is refused


def number(file: Path, name: bytes, after: int, kind: str, value: int) -> None:
    """Write a number some bytes behind a name in the header."""
    content = bytearray(file.read_bytes())
    at = content.index(name) + len(name) + after
    struct.pack_into(kind, content, at, value)
    file.write_bytes(content)


@pytest.fixture
def small(tmp_path) -> Path:
    state = {"model.diffusion_model.a.weight": torch.randn(32, 256), "model.diffusion_model.b": torch.ones(3)}
    written(tmp_path / "x.gguf", state, "Q8_0", comfy=True)
    return tmp_path / "x.gguf"


@pytest.mark.parametrize(
    ("name", "after", "kind", "value", "said"),
    [
        (b"GGUF", 0, "<I", 1, "version 1"),
        (b"GGUF", 4, "<Q", 2**62, "as no SD model has"),
        (b"GGUF", 12, "<Q", 2**62, "as no SD model has"),
        (b"GGUF", 12, "<Q", 2, "broken GGUF header"),
        (b"general.architecture", 0, "<I", 77, "a value of the type 77"),
        (b"general.architecture", 4, "<Q", 2**63, "a name of"),
        (b"a.weight", 0, "<I", 5, "a tensor of 5 sides"),
        (b"a.weight", 4, "<Q", 2**62, "more than 63 bits|another size"),
        (b"a.weight", 4, "<Q", 33, "rows of 33 values"),
        (b"a.weight", 12, "<Q", 64, "hole between them, or that overlap"),
        (b"a.weight", 20, "<I", 20, "in IQ4_NL, which is not read: take a file in Q8_0"),
        (b"a.weight", 20, "<I", 1000, "in the type 1000, which is not read"),
        (b"a.weight", 24, "<Q", 32, "hole between them, or that overlap"),
    ],
)
def test_headers_that_lie(name, after, kind, value, said, small):
    number(small, name, after, kind, value)
    with pytest.raises(TightfitError, match=said) as error:
        tightfit.inspect(str(small))
    assert str(error.value).startswith(str(small))
    assert "\n" not in str(error.value)


def test_files_that_are_cut_or_something_else(small, tmp_path):
    content = small.read_bytes()
    for cut in (4, 20, 100, len(content) - 64):
        (tmp_path / "cut.gguf").write_bytes(content[:cut])
        with pytest.raises(TightfitError, match=r"truncated|it ends in the middle"):
            tightfit.inspect(str(tmp_path / "cut.gguf"))
    for begin, said in {b"<html>": "web page", b"{}": "is no GGUF file", b"": "is no GGUF file"}.items():
        (tmp_path / "other.gguf").write_bytes(begin)
        with pytest.raises(TightfitError, match=said):
            tightfit.inspect(str(tmp_path / "other.gguf"))
    writer = gguf.GGUFWriter(str(tmp_path / "llm.gguf"), "llama")
    writer.add_tensor("output.weight", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(TightfitError, match="a model of the kind 'llama'"):
        tightfit.inspect(str(tmp_path / "llm.gguf"))


def test_a_hundred_damaged_headers(files, tmp_path):
    """One line each, in little time; what is read all the same has the sizes that it says."""
    state = {name: t for name, t in load_file(files["sd1"]).items() if "input_blocks.1." in name}
    written(tmp_path / "x.gguf", state, "Q4_0", comfy=True)
    whole = (tmp_path / "x.gguf").read_bytes()
    tensors, _ = ours.read_file(tmp_path / "x.gguf")
    header, draw = min(tensor.offset for tensor in tensors.values()), random.Random(18)
    numbers = (0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, 31, 33, 8, 9)
    read = 0
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            at, size = draw.randrange(4, header - 8), draw.choice((1, 4, 8))
            value = draw.choice((draw.choice(numbers), draw.getrandbits(64))) % 256**size
            content[at : at + size] = value.to_bytes(size, "little")
        (tmp_path / "y.gguf").write_bytes(content[: draw.choice((len(content), draw.randrange(header)))])
        begin = time.process_time()
        try:
            for tensor in ours.read_file(tmp_path / "y.gguf")[0].values():
                assert tensor.offset + tensor.stored_bytes <= len(content)
                assert math.prod(tensor.shape) == tensor.count
                read += 1
        except TightfitError as error:
            assert "\n" not in str(error)
        assert time.process_time() - begin < 5
    assert read
