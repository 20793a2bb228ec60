"""Blocks that come again are written down as if they were followed again."""

from __future__ import annotations

import pytest
import torch
from tightfit.runtime.backends.torch import dryrun, networks
from tightfit.runtime.backends.torch.repeated import alike
from tightfit.runtime.models.families.family import Extent
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.placement import Placement


class Block(torch.nn.Module):
    """Several layers; `how` is what is done with the input besides."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how, self.layers = how, torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(8))
        self.kept: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, beside: torch.Tensor | None = None) -> torch.Tensor:
        y = x
        for layer in self.layers:
            y = torch.relu(layer(y))
        if self.how == "keeps":
            self.kept.append(y * 2)
        if self.how == "adds":
            x.add_(y)
        parts = {"same": x, "view": y.view(-1), "part": y[:1]}
        return parts.get(self.how, y if beside is None else y + beside).view(-1, 8)


class Stack(torch.nn.Module):
    def __init__(self, *hows: str) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(map(Block, hows))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(block(x), beside=x)
        return x


def traces(module: torch.nn.Module, call: networks.Forward, shapes, dtype, monkeypatch) -> list[dryrun.Trace]:
    made = []
    for blocks in (lambda _: [], alike):
        monkeypatch.setattr(dryrun, "alike", blocks)
        dryrun._sizes_of.clear()
        made.append(dryrun._trace(module, call, shapes, dtype, "cpu"))
    dryrun._sizes_of.clear()
    return made


@pytest.mark.parametrize("how", ["", "same", "view", "part", "keeps", "adds"])
def test_of_any_block_the_trace_is_the_same(monkeypatch, how):
    with torch.device("meta"):
        stack = Stack(*[how] * 3, "").eval().requires_grad_(False)
    calls = []
    stack.get_submodule("blocks.1.layers.0").register_forward_pre_hook(lambda *_: calls.append(1))
    each, once = traces(stack, lambda module, x: (module(x),), {"x": (4, 8)}, torch.float32, monkeypatch)
    assert each == once
    assert alike(stack)[0] == ["blocks.0", "blocks.1", "blocks.2", *["blocks.3"][: not how]]
    assert "forward" not in vars(stack.blocks[0])
    is_followed_again = how in ("same", "part", "keeps")  # it answers, or leaves, other than what it has made
    assert len(calls) == (4 if is_followed_again else 2)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_of_a_network_the_trace_is_the_same(deep_models, monkeypatch, precision):
    spec = inspect(deep_models["sdxl"])
    placement = Placement("torch", precision, "fp32", "resident", "sdpa", "whole")
    module, *_ = dryrun._module(spec.denoiser, placement, "cpu")
    call, shapes = (
        networks.forward(spec.denoiser, placement),
        spec.inputs(spec.denoiser, *Extent(2, 64, 96, 1)),
    )
    dryrun.workspace(module).allocate(torch.float32, torch.device("meta"))
    each, once = traces(module, call, shapes, torch.float32, monkeypatch)
    assert each == once
    assert len(alike(module)) > 1
