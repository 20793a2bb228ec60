"""The bitsandbytes engine: by bitsandbytes itself where it is installed, else by a stand-in that reads its
order of codes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tightfit.kernels import nf4
from tightfit.kernels.formats import FORMATS, NF4, dequantise
from tightfit.kernels.quantise import quantise
from tightfit.runtime.adapters import adapted
from tightfit.runtime.adapters.lora import Lora
from tightfit.runtime.backends.torch import networks, quantised
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.machine.profiles import profile
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.pipeline import Pipeline
from tightfit.runtime.placement import Placement
from tightfit.runtime.planner import choose as planner
from tightfit.runtime.planner.wishes import Wishes
from tightfit.runtime.request import Request

FORM = FORMATS["nf4-b64"]
REQUEST = Request("a red heart", num_inference_steps=3, seed=1, width=64, height=64, scheduler="ddim")
CPU = Hardware.detect("cpu")


def stand_in(x, packed, scale, bias):
    """Neighbours share a byte, the first of them in its high bits."""
    codes = torch.stack([packed >> 4, packed & 15], -1).view(len(packed), -1, 64)
    weight = (torch.tensor(NF4)[codes.long()] * scale[..., None]).flatten(1)
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias)


@pytest.fixture(params=["bitsandbytes", "a stand-in"])
def engine(request, monkeypatch):
    if request.param == "bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    else:
        monkeypatch.setattr(nf4, "problem", lambda: None)
        monkeypatch.setattr(nf4, "linear_nf4", stand_in)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 77])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.usefixtures("engine")
def test_products_are_those_of_the_dequantised_weight(dtype, rows, has_bias):
    torch.manual_seed(0)
    weight, x = torch.randn(96, 192), torch.randn(2, rows, 192, dtype=dtype)
    parts = quantise(weight, FORM)
    bias = torch.randn(96, dtype=dtype) if has_bias else None
    exact = torch.nn.functional.linear(
        x.double(), dequantise(parts, FORM, weight.shape).double(), None if bias is None else bias.double()
    )
    out = nf4.linear_nf4(x, nf4.reorder(parts["packed"]), parts["scale"], bias)
    assert out.dtype == dtype
    allowed = 1e-5 if dtype == torch.float32 else 2e-2
    assert (out.double() - exact).abs().max() < allowed * exact.abs().max()


def test_what_we_quantise_is_what_bitsandbytes_would():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    weight = torch.randn(96, 192)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    parts = quantise(weight, FORM)
    assert parts["scale"].flatten().equal(state.absmax)
    assert nf4.reorder(parts["packed"]).flatten().equal(codes.flatten())


def painted(spec, **wishes):
    with Pipeline(spec, CPU, Wishes(**wishes)) as pipeline:
        result = pipeline.generate(REQUEST)
    assert result.peak_bytes == pytest.approx(result.plan.predicted.peak_bytes, rel=0.05)
    return np.asarray(result.images[0], dtype=float)


def psnr(one, other):
    error = np.square(one - other).mean()
    return 10 * math.log10(255**2 / error) if error else math.inf


@pytest.mark.usefixtures("engine")
def test_the_picture_is_that_of_our_own_nf4(shallow_models, monkeypatch):
    """The same formats, by torch; and another picture than int4's."""
    spec = inspect(str(shallow_models["sd1"]))
    theirs = painted(spec, backend="bitsandbytes", compute="fp32")
    assert psnr(painted(spec, precision="int4", compute="fp32"), theirs) < 60
    monkeypatch.setattr(quantised, "LinearNF4", quantised.Linear)
    assert psnr(painted(spec, backend="bitsandbytes", precision="int4", compute="fp32"), theirs) > 75


@pytest.mark.parametrize("residency", ["resident", "staged"])
@pytest.mark.usefixtures("engine")
def test_predicted_in_bf16_and_with_a_lora(shallow_models, tmp_path, residency):
    spec = inspect(str(shallow_models["sdxl"]))
    name = next(name for name in spec.denoiser.tensors if name.endswith("attn1.to_q.weight"))
    out, inputs = spec.denoiser.tensors[name].shape
    layer = f"unet.{name.removesuffix('.weight')}"
    parts = {f"{layer}.lora_A.weight": torch.ones(2, inputs), f"{layer}.lora_B.weight": torch.ones(out, 2)}
    save_file(parts, tmp_path / "lora.safetensors")
    lora = Lora.read(tmp_path / "lora.safetensors", 0.5)
    how = {"backend": "bitsandbytes", "residency": residency}
    alone, both = (painted(each, **how) for each in (spec, adapted(spec, [lora])))
    assert psnr(alone, both) < 45


def test_linears_of_the_denoiser_alone(shallow_models):
    spec = inspect(str(shallow_models["sd1"]))
    way = Placement("bitsandbytes", "int4", "fp32", "staged", "sdpa", "whole")
    layers = quantised.quantised_layers(networks.build(spec.denoiser, way, "cpu"))
    kinds = {path: type(layer).__name__ for path, layer in layers.items()}
    assert {kinds[path] for path in kinds if ".attn" in path and layers[path].row % 64 == 0} == {"LinearNF4"}
    assert "Conv2d" in kinds.values()
    assert not any(layer.row % 64 for path, layer in layers.items() if kinds[path] == "LinearNF4")
    for component in (*spec.text_encoders, spec.decoder):
        others = quantised.quantised_layers(networks.build(component, way, "cpu")).values()
        assert not any(isinstance(layer, quantised.LinearNF4) for layer in others)


def plans(spec, **wishes):
    wishes |= {"residency": "staged", "tiling": "whole", "attention": "sdpa"}
    hardware = profile("gtx-1660-super")
    wanted = Wishes(**wishes)
    return planner.plan(hardware, spec, REQUEST.resolve(spec), wanted)


def test_it_is_a_candidate_only_where_it_is_asked_for(shallow_models):
    spec = inspect(str(shallow_models["sd1"]))
    backends = {each.backend for plan in plans(spec) for each in plan.placements.values()}
    assert backends == {"torch"}
    first, *_ = asked = plans(spec, backend="bitsandbytes")
    assert {each.backend for plan in asked for each in plan.placements.values()} == {"bitsandbytes"}
    assert first.fits
    assert {plan.denoiser.precision for plan in asked if plan.fits} == {"int4"}


@pytest.mark.parametrize(
    ("why", "wishes", "words"),
    [
        (
            "it is not installed: pip install bitsandbytes",
            {"precision": "int4"},
            "not installed: pip install bitsandbytes",
        ),
        (None, {"precision": "bf16"}, "NF4 here, 4 bits: choose int4"),
        (None, {"residency": "streamed", "precision": "int4"}, "cannot stream: export"),
    ],
)
def test_refused_in_one_line(shallow_models, monkeypatch, why, wishes, words):
    monkeypatch.setattr(nf4, "problem", lambda: why)
    with (
        pytest.raises(TightfitError, match=words),
        Pipeline(inspect(str(shallow_models["sd1"])), CPU, Wishes(backend="bitsandbytes", **wishes)) as pipe,
    ):
        pipe.generate(REQUEST)
