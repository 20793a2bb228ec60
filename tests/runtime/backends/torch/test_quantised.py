"""Quantised layers answer what their weights mean, whole or in parts, and are filled from plain weights and
from stored parts."""

from __future__ import annotations

import pytest
import torch
from tightfit.kernels.formats import FORMATS, dequantise
from tightfit.kernels.quantise import quantise
from tightfit.runtime.backends.torch import quantised
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.machine.hardware import Hardware
from torch import nn

LAYERS = {
    "linear": (lambda: nn.Linear(70, 33), (2, 5, 70)),
    "linear without bias": (lambda: nn.Linear(64, 128, bias=False), (3, 64)),
    "3x3": (lambda: nn.Conv2d(20, 36, 3, padding=1), (2, 20, 9, 7)),
    "3x3 stride 2": (lambda: nn.Conv2d(32, 16, 3, stride=2, padding=1, bias=False), (1, 32, 8, 8)),
    "1x1": (lambda: nn.Conv2d(66, 17, 1), (1, 66, 5, 5)),
    "grouped": (lambda: nn.Conv2d(24, 36, 3, groups=4), (2, 24, 6, 6)),
}


def put_in(
    layer: nn.Module, name: str, dtype=torch.float32, device="cpu", dynamic=False
) -> tuple[nn.Module, torch.Tensor]:
    """The layer in a network of one, quantised and filled, and the weight that its parts mean."""
    network = nn.ModuleDict({"layer": layer.requires_grad_(False)}).to(dtype)
    weight = layer.weight.detach().float()
    quantised.quantise_layers(network, {"layer": name}, device, dynamic=dynamic)
    parts = quantise(weight, FORMATS[name])
    for part, value in parts.items():
        setattr(network["layer"], part, nn.Parameter(value, requires_grad=False))
    quantised.workspace(network).allocate(dtype, torch.device("cpu"))
    return network["layer"], dequantise(parts, FORMATS[name], weight.shape)


def test_hooks_of_a_layer_are_its_quantised_ones():
    network = torch.nn.ModuleDict({"layer": torch.nn.Conv2d(64, 64, 1)})
    network["layer"].register_forward_hook(after := lambda *_: None)
    network["layer"].register_forward_pre_hook(before := lambda *_: None)
    quantised.quantise_layers(network, {"layer": "int8"}, "cpu")
    made = network["layer"]
    assert isinstance(made, quantised.Quantised)
    assert ([*made._forward_hooks.values()], [*made._forward_pre_hooks.values()]) == ([after], [before])


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # in which order the weight is unpacked; both run here
@pytest.mark.parametrize("at_once", [2**22, 700])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["int8", "int4-g64", "nf4-g64", "int8-b32", "int4-min-b32"])
def test_layers(monkeypatch, name, kind, at_once, device):
    monkeypatch.setattr(quantised, "AT_ONCE", at_once)
    make, shape = LAYERS[kind]
    layer = make()
    x = torch.randn(shape)
    replaced, weight = put_in(layer, name, device=device)
    plain = make().double()
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.double())
    plain.weight = nn.Parameter(weight.double())
    with torch.inference_mode():
        answer = replaced(x)
    assert answer.shape == plain(x.double()).shape
    torch.testing.assert_close(answer.double(), plain(x.double()), rtol=1e-4, atol=1e-5)


WHOLE = {"3x3", "3x3 stride 2", "wide"}  # those that are multiplied in whole numbers on a CPU
LAYERS_TOO = LAYERS | {"wide": (lambda: nn.Linear(33, 160), (2, 5, 33))}


@pytest.mark.skipif("int8" not in Hardware.detect("cpu").rates, reason="this processor has no VNNI")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS_TOO)
def test_whole_numbers(kind, dtype):
    make, shape = LAYERS_TOO[kind]
    layer = make().to(dtype)
    x = torch.randn(shape).to(dtype)
    replaced, weight = put_in(layer, "int8", dtype, dynamic=True)
    expected = nn.functional.conv2d if isinstance(layer, nn.Conv2d) else nn.functional.linear
    how = (layer.stride, layer.padding, layer.dilation, layer.groups) if isinstance(layer, nn.Conv2d) else ()
    right = expected(x.double(), weight.double(), None if layer.bias is None else layer.bias.double(), *how)
    assert isinstance(replaced, quantised.LinearInt8) == (kind in WHOLE)
    replaced.prepare()
    with torch.inference_mode():
        answer = replaced(x)
    assert (answer.shape, answer.dtype) == (right.shape, dtype)
    assert (answer.double() - right).norm() < 0.02 * right.norm()  # a 128th of the largest value is a code
    if kind not in WHOLE:
        return
    shadow = nn.ModuleDict({"layer": make()}).to("meta", dtype)
    quantised.quantise_layers(shadow, {"layer": "int8"}, "cpu", dynamic=True)
    quantised.workspace(shadow).allocate(dtype, torch.device("meta"))
    with torch.inference_mode():
        like = shadow["layer"](torch.empty(shape, dtype=dtype, device="meta"))
    assert (like.shape, like.dtype, like.stride()) == (answer.shape, answer.dtype, answer.stride())


def test_which_layers_multiply_whole_numbers_on_a_gpu():
    layers = {
        "a": nn.Linear(64, 10),
        "b": nn.Conv2d(8, 16, 3),
        "c": nn.Conv2d(8, 16, 3, groups=2),
        "d": nn.Linear(64, 9),
    }
    network = nn.ModuleDict(layers)
    quantised.quantise_layers(
        network, {"a": "int8", "b": "int8", "c": "int8", "d": "int8-g64"}, "cuda", dynamic=True
    )
    assert [type(part) for part in network.values()] == [
        quantised.LinearInt8, quantised.Conv2dInt8, quantised.Conv2d, quantised.Linear
    ]  # fmt: skip
    assert network["b"].sums.shape == (16,)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding(name, dtype):
    replaced, weight = put_in(nn.Embedding(50, 33), name, dtype)
    ids = torch.tensor([[3, 49, 0], [3, 3, 7]])
    with torch.inference_mode():
        answer = replaced(ids)
    assert answer.dtype == dtype
    torch.testing.assert_close(answer.float(), weight[ids], rtol=2**-6, atol=2**-6)
    assert quantised.workspace(nn.ModuleDict({"layer": replaced})).buffer.numel() == 0


def test_changing_the_type_of_a_network_leaves_its_parts():
    replaced, _ = put_in(nn.Linear(64, 8), "int4-g64")
    before = {part: getattr(replaced, part).clone() for part in ("packed", "scale", "zero")}
    replaced.to(torch.bfloat16)
    assert replaced.bias.dtype == torch.bfloat16
    for part, value in before.items():
        assert torch.equal(getattr(replaced, part), value)


def test_the_workspace_is_the_largest_layers():
    network = nn.ModuleDict({"a": nn.Linear(64, 10), "b": nn.Conv2d(8, 16, 3), "c": nn.Embedding(999, 8)})
    quantised.quantise_layers(network, {"a": "int4-g64", "b": "int8", "c": "int8"}, "cpu")
    shared = quantised.workspace(network)
    assert shared.bytes(torch.bfloat16) == 16 * 8 * 9 * 2
    assert shared.bytes(torch.float32) == 16 * 8 * 9 * 4
    assert list(quantised.quantised_layers(network)) == ["a", "b", "c"]


def test_a_gpus_workspace_has_no_room_for_codes():
    """Triton needs none; a CPU's has."""
    for device, codes in (("cuda", 0), ("cpu", 16 * 8 * 9 // 2)):
        network = nn.ModuleDict({"a": nn.Conv2d(8, 16, 3)})
        quantised.quantise_layers(network, {"a": "int4-g64"}, device)
        assert quantised.workspace(network).bytes(torch.float16) == 16 * 8 * 9 * 2 + codes


@pytest.mark.parametrize("formats", [{"nothing": "int8"}, {"a": "int3"}, {"norm": "int8"}])
def test_a_manifest_that_fits_no_network(formats):
    network = nn.ModuleDict({"a": nn.Linear(64, 10), "norm": nn.LayerNorm(10)})
    with pytest.raises(TightfitError, match="export the model again"):
        quantised.quantise_layers(network, formats, "cpu")
