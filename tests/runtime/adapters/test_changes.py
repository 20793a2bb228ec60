"""What each form of adapter does to a weight, against the formula written out in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tightfit.kernels.formats import FORMATS
from tightfit.kernels.formats import dequantise as meaning
from tightfit.runtime.adapters.changes import Added, Decomposed, Hadamard, Kronecker, LowRank, Scaled
from tightfit.runtime.backends.torch import loading, quantised
from tightfit.runtime.backends.torch.adapted import Adapted
from tightfit.runtime.models.layouts.safetensors import read_header

LINEAR, KERNEL = (24, 40), (24, 40, 3, 3)
SCALE = 0.75


def kron(a, b):
    """(m1, n1) and (m2, n2, …) → (m1 m2, n1 n2, …)."""
    return torch.kron(a.reshape(*a.shape, *[1] * (b.ndim - 2)), b.contiguous())


def tucker(middle, a, b):
    """LyCORIS's order: a is (rank, out), b (rank, in)."""
    return torch.einsum("ij...,ip,jr->pr...", middle, a, b)


def of_lora(draw, shape):
    up, down = draw(24, 4, *[1] * len(shape[2:])), draw(4, *shape[1:])
    delta = (up.flatten(1).double() @ down.flatten(1).double()).view(shape)
    return (up, down), lambda weight: weight + SCALE * delta, lambda parts: LowRank(parts, SCALE)


def of_tucker(draw, shape):
    up, down, middle = draw(24, 4, 1, 1), draw(5, 40, 1, 1), draw(4, 5, *shape[2:])
    up64, down64 = up.flatten(1).double(), down.flatten(1).double()
    delta = tucker(middle.double(), up64.T, down64)
    return (up, down, middle), lambda weight: weight + SCALE * delta, lambda parts: LowRank(parts, SCALE)


def of_loha(draw, shape):
    count = math.prod(shape[1:])
    tensors = draw(24, 4), draw(4, count), draw(24, 4), draw(4, count)
    a1, b1, a2, b2 = (each.double() for each in tensors)
    delta = ((a1 @ b1) * (a2 @ b2)).view(shape)
    return tensors, lambda weight: weight + SCALE * delta, lambda parts: Hadamard(parts, SCALE)


def of_loha_as_convolutions(draw, shape):
    tensors, exact, make = of_loha(draw, shape)
    return tuple(tensor[:, :, None, None] for tensor in tensors), exact, make


def of_loha_tucker(draw, shape):
    tensors = tuple(
        draw(*sides) for sides in ((4, 24), (4, 40), (4, 24), (4, 40), (4, 4, *shape[2:]), (4, 4, *shape[2:]))
    )
    a1, b1, a2, b2, t1, t2 = (each.double() for each in tensors)
    delta = tucker(t1, a1, b1) * tucker(t2, a2, b2)
    return tensors, lambda weight: weight + SCALE * delta, lambda parts: Hadamard(parts, SCALE)


def of_lokr(draw, shape):
    tensors = draw(4, 5), draw(6, 8, *shape[2:])
    one, two = (each.double() for each in tensors)
    return tensors, lambda weight: weight + SCALE * kron(one, two), lambda parts: Kronecker(parts, SCALE, 1)


def of_lokr_factored(draw, shape):
    tensors = draw(4, 2), draw(2, 5), draw(6, 3), draw(3, 8, *shape[2:])
    a1, b1, a2, b2 = (each.double() for each in tensors)
    delta = kron(a1 @ b1, (a2 @ b2.flatten(1)).view(6, 8, *shape[2:]))
    return tensors, lambda weight: weight + SCALE * delta, lambda parts: Kronecker(parts, SCALE, 2)


def of_lokr_as_convolutions(draw, shape):
    (one, *two), exact, make = of_lokr_factored(draw, shape)
    return (one[..., None, None], *(tensor.reshape(*tensor.shape, 1, 1) for tensor in two)), exact, make


def of_lokr_tucker(draw, shape):
    tensors = draw(4, 5), draw(3, 6), draw(3, 8), draw(3, 3, *shape[2:])
    one, a, b, middle = (each.double() for each in tensors)
    delta = kron(one, tucker(middle, a, b))
    return tensors, lambda weight: weight + SCALE * delta, lambda parts: Kronecker(parts, SCALE, 1)


def of_ia3(draw, shape):
    tensors = (draw(24),)
    factor = 1 + SCALE * tensors[0].double().view(-1, *[1] * len(shape[1:]))
    return tensors, lambda weight: weight * factor, lambda parts: Scaled(parts, SCALE)


def of_ia3_on_input(draw, shape):
    tensors = (draw(1, 40, *[1] * len(shape[2:])),)
    factor = 1 + SCALE * tensors[0].double()
    return tensors, lambda weight: weight * factor, lambda parts: Scaled(parts, SCALE, True)


def of_difference(draw, shape):
    tensors = (draw(*shape),)
    return tensors, lambda weight: weight + SCALE * tensors[0].double(), lambda parts: Added(parts, SCALE)


FORMS = [
    (of_lora, LINEAR), (of_lora, KERNEL), (of_tucker, KERNEL), (of_loha, LINEAR), (of_loha, KERNEL),
    (of_loha_tucker, KERNEL), (of_lokr, LINEAR), (of_lokr, KERNEL), (of_lokr_factored, LINEAR),
    (of_loha_as_convolutions, LINEAR), (of_lokr_as_convolutions, LINEAR),
    (of_lokr_factored, KERNEL), (of_lokr_tucker, KERNEL), (of_ia3, LINEAR), (of_ia3, KERNEL),
    (of_ia3_on_input, LINEAR), (of_ia3_on_input, KERNEL), (of_difference, LINEAR), (of_difference, KERNEL),
]  # fmt: skip


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator) * 0.3


def stored(folder, tensors):
    """Their headers, once they are in a file."""
    names = {f"{number}": tensor.contiguous() for number, tensor in enumerate(tensors)}
    save_file(names, folder / "adapter.safetensors")
    header = read_header(folder / "adapter.safetensors")
    return tuple(header[name] for name in names)


def read(tensor):
    out = torch.empty(tensor.shape)
    loading.read_into(out, tensor, torch.empty(tensor.stored_bytes, dtype=torch.uint8))
    return out


def written(folder, weight):
    save_file({"weight": weight}, folder / "model.safetensors")
    return read_header(folder / "model.safetensors")["weight"]


@pytest.mark.parametrize("block", [2**18, 100])
@pytest.mark.parametrize(("form", "shape"), FORMS)
def test_a_plain_weight_is_changed_while_it_is_read(tmp_path, monkeypatch, draw, form, shape, block):
    monkeypatch.setattr(loading, "BLOCK", block)
    weight = draw(*shape)
    tensors, exact, change = form(draw, shape)
    patch = change(stored(tmp_path, tensors))
    assert patch.fits(shape)
    assert not patch.fits((shape[0] + 1, shape[1] + 1, *shape[2:]))
    tensor = replace(written(tmp_path, weight), patches=(patch,))
    assert torch.allclose(read(tensor).double(), exact(weight.double()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.6, -0.5])
@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize(
    ("form", "shape"), [(of_lora, LINEAR), (of_lora, KERNEL), (of_loha, LINEAR), (of_lokr, KERNEL)]
)
def test_dora_scales_rows_or_columns_to_lengths(tmp_path, monkeypatch, draw, form, shape, by_rows, strength):
    monkeypatch.setattr(loading, "BLOCK", 500)
    weight = draw(*shape)
    tensors, exact, change = form(draw, shape)
    sides = (24, *[1] * len(shape[1:])) if by_rows else (1, 40, *[1] * len(shape[2:]))
    lengths = draw(*sides).abs()
    base = written(tmp_path, weight)
    *inner, header = stored(tmp_path, (*tensors, lengths))
    patch = Decomposed(
        (*inner, header, *(() if by_rows else (base,))), strength, change(tuple(inner)), by_rows
    )
    changed = exact(weight.double())
    axes = [axis for axis in range(len(shape)) if axis != (0 if by_rows else 1)]
    whole = changed * lengths.double() / changed.square().sum(axes, keepdim=True).sqrt()
    expected = weight.double() + strength * (whole - weight.double())
    assert torch.allclose(read(replace(base, patches=(patch,))).double(), expected, rtol=0, atol=1e-5)


def layer_of(weight, form):
    """A quantised layer, and the weight that it means."""
    bias = torch.linspace(-1, 1, len(weight))
    made = torch.nn.Linear(40, 24) if weight.ndim == 2 else torch.nn.Conv2d(40, 24, 3, padding=1)
    made.bias = torch.nn.Parameter(bias, requires_grad=False)
    layer = quantised.filled(made, weight, form, "cpu", False)
    parts = {name: getattr(layer, name) for name in FORMATS[form].parts(weight.shape)}
    return layer, meaning(parts, FORMATS[form], weight.shape).double()


def answer(weight, bias, x):
    if weight.ndim == 2:
        return torch.nn.functional.linear(x.double(), weight, bias.double())
    return torch.nn.functional.conv2d(x.double(), weight, bias.double(), padding=1)


@pytest.mark.parametrize("form_of_weight", ["int8", "int4-g32"])
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(("form", "shape"), FORMS)
@torch.inference_mode()
def test_a_quantised_weight_keeps_its_codes(tmp_path, monkeypatch, draw, form, shape, many, form_of_weight):
    monkeypatch.setattr(quantised, "AT_ONCE", 5 * math.prod(shape[1:]))  # in parts of five rows
    layer, weight = layer_of(draw(*shape), form_of_weight)
    packed = layer.packed.clone()
    adapted_by, exact = [], weight
    for number in range(2):  # two adapters of one form
        tensors, exact_of, change = form(draw, shape)
        (tmp_path / str(number)).mkdir()
        adapted_by.append((change(stored(tmp_path / str(number), tensors)), tensors))
        exact = exact_of(exact)
    layer.adapted = Adapted([patch for patch, _ in adapted_by], shape)
    values = (tensor for _, tensors in adapted_by for tensor in tensors)
    for name, value in zip(layer.adapted.stored, values, strict=True):
        layer.adapted._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
    x = draw(*((3, 100 if many else 2, 40) if len(shape) == 2 else (2, 40, *([20, 20] if many else [2, 3]))))
    assert not (layer.adapted.beside(x) and many)
    assert layer.adapted.beside(x) or many or not layer.adapted.low_rank
    assert torch.allclose(layer(x).double(), answer(exact, layer.bias, x), rtol=0, atol=2e-4)
    assert not layer.adapted.merging
    assert torch.equal(layer.packed, packed)
    layer.adapted = None
    assert torch.allclose(layer(x).double(), answer(weight, layer.bias, x), rtol=0, atol=2e-4)


@pytest.mark.parametrize("shape", [LINEAR, KERNEL])
@torch.inference_mode()
def test_whole_numbers_have_the_products_beside_them(tmp_path, draw, shape):
    made = torch.nn.Linear(40, 24) if len(shape) == 2 else torch.nn.Conv2d(40, 24, 3, padding=1)
    network = torch.nn.ModuleDict({"layer": made.requires_grad_(False)})
    kind = quantised.LinearInt8 if len(shape) == 2 else quantised.Conv2dInt8
    layer = kind(made, FORMATS["int8"], quantised.Workspace("cpu"))
    assert network
    for name, part in quantised.quantise(made.weight, FORMATS["int8"]).items():
        setattr(layer, name, torch.nn.Parameter(part, requires_grad=False))
    layer.prepare()
    tensors, exact_of, change = of_lora(draw, shape)
    x = draw(3, 300, 40) if len(shape) == 2 else draw(2, 40, 20, 20)
    alone = layer(x)
    layer.adapted = Adapted([change(stored(tmp_path, tensors))], shape)
    for name, value in zip(layer.adapted.stored, tensors, strict=True):
        layer.adapted._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
    nothing = torch.zeros(shape, dtype=torch.float64)
    difference = answer(exact_of(nothing), torch.zeros(24), x)
    assert torch.allclose((layer(x) - alone).double(), difference, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "sides",
    [
        ((24, 4), (5, 40)), ((24, 4), (4, 0)), ((24,), (4, 40)), ((24, 4, 1, 1), (4, 40, 1, 1), (4, 3, 3, 3)),
    ],
)  # fmt: skip
def test_tensors_that_do_not_go_together(tmp_path, sides):
    with pytest.raises(ValueError):
        LowRank(stored(tmp_path, tuple(torch.zeros(each) for each in sides)), 1.0)


@pytest.mark.parametrize(
    "sides",
    [
        ((4, 1, 24), (4, 40), (4, 24), (4, 40), (4, 4, 3, 3), (4, 4, 3, 3)),
        ((4, 24), (4, 40), (4, 24), (4, 40), (4, 4, 3, 3)),
    ],
)
def test_factors_of_convolutions_in_three_are_matrices(tmp_path, sides):
    with pytest.raises(ValueError):
        Hadamard(stored(tmp_path, tuple(torch.zeros(each) for each in sides)), 1.0)


def test_vectors_take_differences_only(tmp_path, draw):
    up, down, factors, number = stored(tmp_path, (draw(1, 4), draw(4, 1), draw(1), draw()))
    assert not LowRank((up, down), 1.0).fits((1,))
    assert not Scaled((factors,), 1.0, True).fits((1,))
    assert (added := Added((number,), 1.0)).fits((1,))
    plain = written(tmp_path, torch.zeros(1))
    assert torch.equal(read(replace(plain, patches=(added,))), read(number).view(1))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_scale_that_decodes_a_weight_stays_with_it(tmp_path, draw, tiny_models, precision):
    """An fp8 checkpoint's, under a LoRA: the weight that is quantised is the scaled one."""
    from tightfit.runtime.adapters.lora import Lora
    from tightfit.runtime.backends.torch import networks
    from tightfit.runtime.models.hub import inspect
    from tightfit.runtime.models.layouts.scales import Scale
    from tightfit.runtime.placement import Placement

    component = (spec := inspect(str(tiny_models["sd1"]))).denoiser
    path = "up_blocks.0.resnets.1.conv1"
    (scale,) = stored(tmp_path, (torch.tensor([2.0]),))
    tensor = replace(component.tensors[f"{path}.weight"], patches=(Scale((scale,)),))
    component = replace(component, tensors={**component.tensors, f"{path}.weight": tensor})
    up, down = draw(tensor.shape[0], 4, 1, 1), draw(4, *tensor.shape[1:])
    file = tmp_path / "lora.safetensors"
    save_file({f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}, file)
    changed = Lora.read(file).apply(replace(spec, components={**spec.components, "unet": component})).denoiser
    placement = Placement("torch", precision, "fp32", "staged", "sdpa", "whole")
    module = networks.build(changed, placement, "cpu")
    loading.fill(module, loading.match(changed, module), torch.float32, torch.device("cpu"))
    x = draw(1, tensor.shape[1], 8, 8)
    weight = 2 * read(replace(tensor, patches=())).double()
    delta = (up.flatten(1).double() @ down.flatten(1).double()).view(weight.shape)
    layer = module.get_submodule(path)
    with torch.inference_mode():
        right = torch.nn.functional.conv2d(x.double(), weight + delta, layer.bias.double(), padding=1)
        error = (layer(x).double() - right).norm() / right.norm()
    assert error < (1e-5 if precision == "fp32" else 0.01)
