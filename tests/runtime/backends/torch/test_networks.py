"""What we put into diffusers' networks answers what diffusers' own does."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention import FeedForward
from tightfit.runtime.backends.torch import networks


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
