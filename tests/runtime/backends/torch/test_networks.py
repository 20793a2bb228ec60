"""What we put into diffusers' networks answers what diffusers' own does."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention import FeedForward
from tightfit.kernels import onednn
from tightfit.runtime.backends.torch import networks, packed
from tightfit.runtime.backends.torch.quantised import filled


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_feed_forward_in_parts(tokens):
    most_bytes = 8 * 16 * 8 * 128  # 128 tokens, 64 of each picture, in fp64
    theirs = FeedForward(16, activation_fn="geglu").double().eval()
    sizes = []
    theirs.net[0].register_forward_hook(lambda _, args, __: sizes.append(args[0].numel() // 16))
    x = torch.randn(2, tokens, 16, dtype=torch.float64)
    with torch.inference_mode():
        exact = theirs(x)
        sizes.clear()
        torch.testing.assert_close(networks.feed_forward(theirs, most_bytes)(x), exact)
    assert sum(sizes) == 2 * tokens
    assert max(sizes) <= 128


def test_every_feed_forward_is_ours(tiny_models):
    from tightfit import inspect
    from tightfit.runtime.placement import Placement

    unet = inspect(tiny_models["sdxl"]).components["unet"]
    module = networks.build(unet, Placement("torch", "fp32", "fp32", "staged", "sdpa", "whole"), "cpu")
    found = [part for part in module.modules() if isinstance(part, FeedForward)]
    assert found
    assert all("forward" in part.__dict__ for part in found)


def _packed(layer):
    network = torch.nn.Sequential(layer)
    packed.pack(network)
    return network[0]


@pytest.mark.skipif(not onednn.multiplies(torch.bfloat16), reason="torch has no oneDNN in bf16 here")
@pytest.mark.parametrize("pixels", [(40, 2), (9, 1), (10, 3), (1, 2)], ids=str)
@pytest.mark.parametrize(
    "made",
    [
        lambda layer: layer,
        _packed,
        lambda layer: filled(layer, layer.weight.float(), "int8", "cpu", dynamic=False),
        lambda layer: filled(layer, layer.weight.float(), "int8", "cpu", dynamic=True),
    ],
    ids=["plain", "packed", "int8", "int8-dynamic"],
)
@torch.inference_mode()
def test_every_other_column_of_one_or_two(made, pixels):
    """Of which oneDNN with AMX alone answers one wrongly."""
    torch.manual_seed(1)
    layer = torch.nn.Conv2d(64, 64, 3, 2, 1).bfloat16()
    x = torch.randn(2, 64, *pixels).bfloat16()
    right = layer.double()(x.double())
    layer = made(layer.bfloat16())
    out = networks.never_narrow(layer.forward, 2)(x)
    assert out.shape == right.shape
    assert (out - right).norm() < 0.02 * right.norm()


def test_networks_for_a_cpu_with_tiles_are_never_narrow(tiny_models, monkeypatch):
    from tightfit import inspect
    from tightfit.runtime.placement import Placement

    monkeypatch.setattr(onednn, "has_tiles", lambda: True)
    for precision in ("bf16", "int8-dynamic"):
        how = Placement("torch", precision, "bf16", "staged", "sdpa", "whole")
        module = networks.build(inspect(tiny_models["sd1"]).components["unet"], how, "cpu")
        convs = [part.conv for part in module.modules() if type(part).__name__ == "Downsample2D"]
        assert convs
        assert all("never_narrow" in conv.forward.__qualname__ for conv in convs)
