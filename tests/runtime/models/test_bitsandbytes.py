"""Folders that bitsandbytes quantised, against its own dequantisation and against one by hand, in fp64."""

from __future__ import annotations

import json
import math
import shutil
from typing import Any

import numpy as np
import pytest
import tightfit
import torch
from safetensors.torch import load_file, save_file
from tightfit.kernels.formats import FORMATS, dequantise
from tightfit.runtime.adapters import adapted
from tightfit.runtime.adapters.lora import Lora
from tightfit.runtime.backends.torch import loading
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.models.layouts.bitsandbytes import tensors_of
from tightfit.runtime.pipeline import Pipeline
from tightfit.runtime.planner.estimate import encodings
from tightfit.runtime.planner.wishes import Wishes
from tightfit.runtime.request import Request

REQUEST = Request("a red heart", num_inference_steps=3, seed=1, width=64, height=64, scheduler="ddim")
# Dettmers et al., "QLoRA", appendix E; and the comment above create_fp4_map in bitsandbytes.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip
FP4 = (0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
TABLES = {"nf4": torch.tensor(NF4), "fp4": torch.tensor((*FP4, *(-value for value in FP4)))}
A_127TH = torch.tensor(7.874015718698502e-3)
KINDS = ("nf4", "nf4-nested", "fp4", "int8")


def in_blocks(weight, kind, size, nested):
    """What bitsandbytes would store of `weight`, and the values that this means: each operation of the format
    in fp64, and its answer rounded to fp32."""
    flat = weight.flatten().double()
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
    absmax, parts = rows.abs().amax(1).clamp_min(1e-6), {}
    state = {"quant_type": kind, "blocksize": size, "dtype": "float32", "shape": list(weight.shape)}
    if nested:
        offset = float(absmax.mean().float())
        table = torch.linspace(-1, 1, 256)
        outer = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        largest = outer.abs().amax(1).clamp_min(1e-6).float()
        codes = (outer / largest[:, None].double() - table.double()[:, None, None]).abs().argmin(0)
        scales = (table[codes].double() * largest[:, None].double()).float()
        absmax = (scales.double() + torch.tensor(offset).double()).float().flatten()[: len(absmax)]
        parts = {"nested_absmax": largest, "nested_quant_map": table}
        parts["absmax"] = codes.flatten()[: len(absmax)].to(torch.uint8)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        absmax = parts["absmax"] = absmax.float()
    table = TABLES[kind].double()
    codes = (rows / absmax.double()[:, None] - table[:, None, None]).abs().argmin(0)
    values = (table[codes] * absmax.double()[:, None]).float().flatten()[: len(flat)].view(weight.shape)
    codes = codes.flatten()[: len(flat) + len(flat) % 2].to(torch.uint8)
    parts |= {
        "": (codes[::2] << 4 | codes[1::2])[:, None],
        "quant_map": TABLES[kind].clone(),
        f"quant_state.bitsandbytes__{kind}": as_bytes(state),
    }
    return {f".{name}" if name else "": part for name, part in parts.items()}, values


def as_bytes(state):
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def in_rows(weight):
    largest = weight.abs().amax(1)
    codes = (weight.double() * 127 / largest.double()[:, None]).round().to(torch.int8)
    products = (codes.double() * largest.double()[:, None]).float()
    return codes, largest, (products.double() * A_127TH.double()).float()


def quantised(tensors, kind, layers):
    """The tensors with the weights of `layers` as a folder has them, and what those weights are."""
    stored, values = dict(tensors), {}
    for layer in layers:
        weight = stored.pop(f"{layer}.weight")
        if kind == "int8":
            codes, largest, values[f"{layer}.weight"] = in_rows(weight)
            stored |= {f"{layer}.weight": codes, f"{layer}.SCB": largest}
            stored[f"{layer}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
        else:
            parts, values[f"{layer}.weight"] = in_blocks(weight, kind[:3], 64, kind.endswith("nested"))
            stored |= {f"{layer}.weight{part}": tensor for part, tensor in parts.items()}
    return stored, values


def save(folder, name, tensors):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)


def configured(folder, **how):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", **how}
    (folder / "config.json").write_text(json.dumps(config))


FILES = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}


def linears(tensors):
    return [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and name.endswith(".weight") and "embedding.weight" not in name
    ]


@pytest.fixture(scope="module")
def folders(shallow_models, tmp_path_factory):
    """A tiny SD 1.x whose linears are quantised, and their values, by kind."""
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("bitsandbytes") / kind
        shutil.copytree(shallow_models["sd1"], folder)
        values = {}
        for part, name in FILES.items():
            tensors = load_file(folder / part / name)
            stored, values[part] = quantised(tensors, kind, linears(tensors))
            save(folder / part, name, stored)
            configured(folder / part, **{"load_in_8bit" if kind == "int8" else "load_in_4bit": True})
        made[kind] = folder, values
    return made


def decoded(tensor, block=2**18):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "BLOCK", block)
        out = torch.empty(tensor.shape)
        loading.read_into(out, tensor, torch.empty(tensor.stored_bytes, dtype=torch.uint8))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_each_value_is_that_of_the_format(folders, kind):
    """To the last bit, whole or block by block; and a row of a format of ours is the same codes."""
    folder, values = folders[kind]
    for part, of_part in values.items():
        tensors, kept = tensors_of(folder / part), 0
        plain = load_file(folder / part / FILES[part])
        assert tensors.keys() == {name for name in plain if ".weight." not in name} - {
            name for name in plain if name.endswith(("SCB", "weight_format"))
        }
        for name, right in of_part.items():
            assert tensors[name].shape == right.shape
            assert decoded(tensors[name]).equal(right)
            assert decoded(tensors[name], 100).equal(right)
            if form := tensors[name].form:
                kept += 1
                codes: Any = tensors[name].encoding
                raw = torch.empty(tensors[name].stored_bytes, dtype=torch.uint8)
                tensors[name].read_into(raw.numpy().data)
                parts = dict(codes.packed(raw, right.shape, loading._stored_beside(codes)))
                ours = dequantise(parts, FORMATS[form], right.shape)
                assert torch.allclose(ours, right, rtol=2.5e-7 if kind == "int8" else 0, atol=0)
        whole = sum(right.shape[1] % 64 == 0 for right in of_part.values())
        assert kept == {"fp4": 0, "int8": len(of_part)}.get(kind, whole)


@pytest.mark.parametrize("shape", [(7, 5), (3, 130), (64, 160), (6, 256), (1, 1)])
@pytest.mark.parametrize("size", [32, 64, 256])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_blocks_go_through_rows(tmp_path, shape, size, kind, nested):
    torch.manual_seed(0)
    parts, right = in_blocks(torch.randn(shape), kind, size, nested)
    save(tmp_path, FILES["unet"], {f"layer.weight{part}": tensor for part, tensor in parts.items()})
    (tmp_path / "config.json").write_text("{}")
    configured(tmp_path)
    assert decoded(tensors_of(tmp_path)["layer.weight"]).equal(right)
    assert decoded(tensors_of(tmp_path)["layer.weight"], 64).equal(right)


@pytest.fixture(scope="module")
def reference():
    """bitsandbytes, whose own dequantisation is the truth where it is installed."""
    return pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("size", [64, 128])
def test_bitsandbytes_writes_it_and_decodes_it_equally(reference, tmp_path, kind, size, dtype, nested):
    torch.manual_seed(0)
    weight = torch.randn(192, 256).to(dtype)
    codes, state = reference.quantize_4bit(
        weight, quant_type=kind, blocksize=size, compress_statistics=nested
    )
    parts = {f"layer.weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    save(tmp_path, FILES["unet"], {"layer.weight": codes, **parts})
    (tmp_path / "config.json").write_text("{}")
    configured(tmp_path)
    tensor = tensors_of(tmp_path)["layer.weight"]
    assert tensor.form == ("nf4-b64" if (kind, size) == ("nf4", 64) else "")
    assert decoded(tensor).to(dtype).equal(reference.dequantize_4bit(codes, state))


def test_bitsandbytes_int8_is_decoded_equally(reference, tmp_path):
    torch.manual_seed(0)
    codes, largest, _ = reference.int8_vectorwise_quant(torch.randn(192, 250).half())
    save(tmp_path, FILES["unet"], {"layer.weight": codes, "layer.SCB": largest})
    (tmp_path / "config.json").write_text("{}")
    configured(tmp_path)
    assert decoded(tensors_of(tmp_path)["layer.weight"]).equal(
        reference.int8_vectorwise_dequant(codes, largest)
    )


def painted(spec, **wishes):
    with Pipeline(spec, Hardware.detect("cpu"), Wishes(**wishes)) as pipeline:
        result = pipeline.generate(REQUEST)
    assert result.peak_bytes == pytest.approx(result.plan.predicted.peak_bytes, rel=0.05)
    return np.asarray(result.images[0], dtype=float)


def psnr(one, other):
    error = np.square(one - other).mean()
    return 10 * math.log10(255**2 / error) if error else math.inf


@pytest.fixture(scope="module")
def pictures(shallow_models, folders):
    """diffusers' in fp32, with the linears' weights replaced by the values of each kind."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    made = {}
    for kind, (_, values) in folders.items():
        pipe = StableDiffusionPipeline.from_pretrained(shallow_models["sd1"], safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        for name, replaced in values.items():
            state = getattr(pipe, name).state_dict()
            for key, value in replaced.items():
                key = key if key in state else key.removeprefix("text_model.")
                assert key in state
                state[key] = value
            getattr(pipe, name).load_state_dict(state)
        generator = torch.Generator().manual_seed(1)
        result: Any = pipe("a red heart", num_inference_steps=3, width=64, height=64, generator=generator)
        made[kind] = np.asarray(result.images[0], dtype=float)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_is_diffusers_with_the_dequantised_weights(folders, pictures, kind):
    spec = inspect(str(folders[kind][0]))
    assert psnr(painted(spec, precision="fp32"), pictures[kind]) > 75
    for other in set(KINDS) - {kind}:
        assert psnr(pictures[other], pictures[kind]) < 60


PAIRS = [("nf4", "int4"), ("nf4-nested", "int8"), ("fp4", "int4"), ("int8", "int8"), ("int8", "int4")]


@pytest.mark.parametrize(("kind", "precision"), [*PAIRS, ("nf4-nested", "bf16"), ("int8", "bf16")])
def test_every_precision_is_predicted_and_near(folders, pictures, kind, precision):
    """bf16 decodes; int4 and int8 quantise what has no format of theirs."""
    spec = inspect(str(folders[kind][0]))
    compute = "bf16" if precision == "bf16" else "fp32"
    picture = painted(spec, precision=precision, compute=compute, residency="staged")
    assert psnr(picture, pictures[kind]) > {"int4": 25, "int8": 40, "bf16": 35}[precision]


@pytest.mark.parametrize(("kind", "precision"), [("nf4-nested", "int4"), ("int8", "int8")])
def test_kept_codes_are_the_stored_values(folders, pictures, monkeypatch, kind, precision):
    """Where all else stays plain, the picture is that of the dequantised weights."""
    from tightfit.runtime.backends.torch import networks
    from tightfit.runtime.costs import known

    monkeypatch.setattr(networks, "recipe", lambda *given: given[-1] or None)
    monkeypatch.setattr(known.KNOWN, "_folder", None)  # which others are not to plan by
    picture = painted(inspect(str(folders[kind][0])), precision=precision, compute="fp32")
    assert psnr(picture, pictures[kind]) > 75


def test_streamed_in_bf16(folders):
    spec = inspect(str(folders["nf4-nested"][0]))
    staged = painted(spec, precision="bf16", residency="staged")
    assert psnr(painted(spec, precision="bf16", residency="streamed"), staged) > 40  # not packed


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_lora_moves_it_as_it_moves_the_plain_model(folders, shallow_models, tmp_path, precision):
    torch.manual_seed(0)
    plain = inspect(str(shallow_models["sd1"]))
    layers = [
        name.removesuffix(".weight")
        for name in plain.denoiser.tensors
        if name.endswith(("attn1.to_q.weight", "attn2.to_out.0.weight"))
    ]
    tensors = {}
    for layer in layers:
        out, inputs = plain.denoiser.tensors[f"{layer}.weight"].shape
        tensors[f"unet.{layer}.lora_A.weight"] = torch.randn(4, inputs) / 4
        tensors[f"unet.{layer}.lora_B.weight"] = torch.randn(out, 4) / 4
    save(tmp_path, "lora.safetensors", tensors)
    pictures = []
    for spec in (plain, inspect(str(folders["nf4"][0]))):
        lora = Lora.read(tmp_path / "lora.safetensors", 0.5)
        pictures.append(
            [painted(each, precision=precision, compute="fp32") for each in (spec, adapted(spec, [lora]))]
        )
    (without, with_it), (alone, both) = pictures
    assert np.corrcoef((both - alone).ravel(), (with_it - without).ravel())[0, 1] > 0.8


def test_a_plan_says_what_is_stored(folders):
    def said(kind, precision):
        spec = inspect(str(folders[kind][0]))
        wishes = tightfit.Wishes(precision=precision)
        best = tightfit.plan(tightfit.profile("rtx-2060"), spec, tightfit.Request("a"), wishes)[0]
        return "; ".join(encodings(spec, best.placements))

    assert "NF4, kept as they are" in said("nf4", "int4")
    assert "NF4, decoded" in said("nf4", "fp16")
    assert "FP4, decoded and quantised again" in said("fp4", "int4")
    assert "int8, kept as they are" in said("int8", "int8")


@pytest.mark.parametrize("method", ["torchao", "quanto", "gptq", "awq", None, 7])
def test_other_methods_are_refused_by_name(sd1_copy, method):
    configured(sd1_copy / "unet", quant_method=method)
    with pytest.raises(TightfitError, match=f"quantised by '?{method}'?, .*--precision int4"):
        inspect(str(sd1_copy))


def test_the_first_configs_name_no_method(folders, tmp_path):
    folder = shutil.copytree(folders["nf4"][0], tmp_path / "model")
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"load_in_4bit": True}
    file.write_text(json.dumps(config))
    assert any(tensor.form == "nf4-b64" for tensor in tensors_of(folder / "unet").values())


def changed(state, **fields):
    return as_bytes({**json.loads(bytes(state.tolist())), **fields})


STATE, INNER = "layer.weight.quant_state.bitsandbytes__nf4", "layer.weight.nested_absmax"
BROKEN = [
    ("no absmax", lambda t: t.pop("layer.weight.absmax"), "lacks layer.weight.absmax"),
    ("no weight", lambda t: t.pop("layer.weight"), "lacks layer.weight, "),
    ("no inner map", lambda t: t.pop("layer.weight.nested_quant_map"), "lacks layer.weight.nested_quant_map"),
    ("no JSON", lambda t: t.update({STATE: t[STATE][:-1]}), "no JSON"),
    ("no object", lambda t: t.update({STATE: torch.tensor([51], dtype=torch.uint8)}), "without a quant_type"),
    ("long", lambda t: t.update({STATE: torch.zeros(9999, dtype=torch.uint8)}), "9999 bytes"),
    ("shape", lambda t: t.update({STATE: changed(t[STATE], shape=[64, 129])}), "said to be .64, 129."),
    ("sides", lambda t: t.update({STATE: changed(t[STATE], shape=[2**21, 2**40])}), "impossible shape"),
    ("none", lambda t: t.update({STATE: changed(t[STATE], shape=None)}), "impossible shape"),
    ("size", lambda t: t.update({STATE: changed(t[STATE], blocksize=48)}), "impossible blocksize"),
    ("zero", lambda t: t.update({STATE: changed(t[STATE], nested_blocksize=0)}), "impossible nested_block"),
    ("nothing", lambda t: t.update({STATE: changed(t[STATE], nested_blocksize=None)}), "nested_absmax as 1"),
    ("kind", lambda t: t.update({STATE: changed(t[STATE], quant_type="fp4")}), "in nf4"),
    ("type", lambda t: t.update({STATE: changed(t[STATE], quant_type=[])}), "impossible quant_type"),
    ("offset", lambda t: t.update({STATE: changed(t[STATE], nested_offset="x")}), "impossible nested_offset"),
    ("few scales", lambda t: t.update({"layer.weight.absmax": t["layer.weight.absmax"][:9]}), "absmax as 9"),
    ("many", lambda t: t.update({INNER: torch.ones(2)}), "nested_absmax as 2 of F32"),
    ("floats", lambda t: t.update({"layer.weight.absmax": torch.ones(128)}), "absmax as 128 of F32"),
]


@pytest.mark.parametrize(("name", "spoil", "words"), BROKEN, ids=[row[0] for row in BROKEN])
def test_what_does_not_fit_is_one_line(tmp_path, name, spoil, words):
    parts, _ = in_blocks(torch.ones(64, 128), "nf4", 64, True)
    tensors = {f"layer.weight{part}": tensor for part, tensor in parts.items()}
    spoil(tensors)
    save(tmp_path, FILES["unet"], tensors)
    (tmp_path / "config.json").write_text("{}")
    configured(tmp_path)
    with pytest.raises(TightfitError, match=words) as error:
        tensors_of(tmp_path)
    assert "\n" not in str(error.value)
    assert "again" in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"SCB": torch.ones(5)}, "SCB as 5 of F32"),
        ({"SCB": torch.ones(8, dtype=torch.int8)}, "SCB as 8 of I8"),
        ({"weight": torch.ones(8, 16)}, "weight as 128 of F32"),
        ({"weight": torch.ones(8, 4, 4, dtype=torch.int8)}, r"shape \[8, 4, 4\]"),
        ({"weight": torch.ones(8, 0, dtype=torch.int8)}, r"shape \[8, 0\]"),
        ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, "in the order 02"),
    ],
)
def test_what_does_not_fit_in_int8_is_one_line(tmp_path, change, words):
    tensors = {"weight": torch.ones(8, 16, dtype=torch.int8), "SCB": torch.ones(8), **change}
    save(tmp_path, FILES["unet"], {f"layer.{name}": tensor for name, tensor in tensors.items()})
    (tmp_path / "config.json").write_text("{}")
    configured(tmp_path)
    with pytest.raises(TightfitError, match=words):
        tensors_of(tmp_path)
