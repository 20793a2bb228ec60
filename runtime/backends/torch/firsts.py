"""What a CPU takes for a network once, before its rates count: seconds of Python that builds and fills it and
counts its first call, of quantising, and of oneDNN that makes products ready."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import mean, median
from typing import Any

import torch
from torch.nn import functional

from ....kernels import onednn
from ....kernels.formats import FORMATS
from ....kernels.quantise import quantise
from ....kernels.recipe import recipe
from ...models.families.family import Extent
from ...models.hub import inspect
from ...models.spec import Component, ModelSpec
from ...placement import Placement
from . import dryrun, loading, networks
from .backend import TorchBackend
from .meter import LiveBytes

_TURNS = 4  # of each measurement
# Channels and side of maps, and rows, inputs and outputs, that nothing else here has: small as the emoji's,
# and as large as SD 1.5's.
_MAPS = (96, 12), (160, 10), (224, 24), (352, 28), (672, 20)
_LINEARS = (144, 96, 128), (100, 160, 192), (288, 256, 768), (1152, 384, 384), (784, 704, 1408)


def network_starts(packs: bool) -> tuple[dict[str, float], float]:
    """Seconds of a module that is built, of a tensor that is filled, of one more in a network that `packs`
    its weights in bf16, and of an operator whose bytes are counted; and seconds of a call. By the emoji's
    U-Net, which has so few weights that little else takes time: all of it in turns, as a loop of one thing
    alone is a third faster than what comes once."""
    turns = [_turn(packs) for _ in range(_TURNS + 1)][1:]
    return {kind: median(turn[kind] for turn in turns) for kind in turns[0] if kind}, median(
        turn[""] for turn in turns
    )


def network() -> tuple[ModelSpec, Component, Extent]:
    """What `network_starts` calls, in fp32."""
    spec = inspect("emoji")
    return spec, spec.denoiser, Extent(1, 64, 64)


def place(compute: str) -> Placement:
    return Placement("torch", compute, compute, "staged", "sdpa", "whole")


def _turn(packs: bool) -> dict[str, float]:
    """What `network_starts` has the medians of; "" is a call."""
    spec, component, extent = network()
    engine = TorchBackend("cpu")

    def filled(compute: str) -> tuple[torch.nn.Module, int, float]:
        """A module, its count of tensors, and the seconds of filling it."""
        module = networks.build(component, place(compute), "cpu")
        stored = loading.match(component, module)
        fill = partial(loading.fill, module, stored, loading.DTYPES[compute], engine.device)
        return module, len(stored), _seconds(fill)

    packed = filled("bf16")[-1] if packs else 0.0
    module, tensors, plain = filled("fp32")
    loaded = _seconds(lambda: engine.load(component, place("fp32")).close())
    inputs = {name: torch.zeros(shape) for name, shape in spec.inputs(component, *extent).items()}
    call = partial(networks.forward(component, place("fp32")), module, **inputs)
    with dryrun.Recorder("cpu", False) as seen:
        call()
    call()
    calling, counted = _seconds(call), _seconds(partial(_counted, call))
    return {
        "": calling,
        "build": max(0.0, loaded - plain) / dryrun.working(module),
        "fill": plain / tensors,
        "pack": max(0.0, packed - plain) / tensors,
        "count": max(0.0, counted - calling) / len(seen.operations),
    }


def _counted(call: Callable[[], Any]) -> None:
    with LiveBytes("cpu"):
        call()


def quantising(kind: str) -> tuple[float, float]:
    """Seconds of a layer with few weights that becomes int8 or int4, and weights/s of one with many."""
    few, many = torch.randn(64, 64, 3, 3), torch.randn(2560, 1280)
    form = FORMATS[recipe(kind, "layer", many.shape) or kind]
    small, large = (_least(lambda x=x: quantise(x, form)) for x in (few, many))
    rate = (many.numel() - few.numel()) / max(large - small, 1e-5)
    return max(0.0, small - few.numel() / rate), rate


def readying(dtype: torch.dtype) -> float:
    """Seconds that a product's first call takes more than its next ones, by the fourth root of its
    operations: the mean of convolutions and of linear layers. 0 in a process that has met them."""

    def share(product: Callable[[], Any], flops: float) -> float:
        first, *others = (_seconds(product) for _ in range(4))
        return max(0.0, first - min(others)) / flops**0.25

    maps, linears = [], []
    for channels, side in _MAPS:
        weight, x = (torch.randn(n, channels, s, s).to(dtype) for n, s in ((channels, 3), (2, side)))
        flops = 2.0 * 9 * x.numel() * channels
        maps.append(share(lambda w=weight, x=x: functional.conv2d(x, w, None, 1, 1), flops))
    for rows, inputs, outputs in _LINEARS:
        weight, x = torch.randn(outputs, inputs).to(dtype), torch.randn(rows, inputs).to(dtype)
        is_packed = dtype is torch.bfloat16 and onednn.multiplies(dtype)
        own = torch.ops.mkldnn._reorder_linear_weight(weight) if is_packed else weight
        multiply: Any = onednn.linear if is_packed else functional.linear
        linears.append(share(lambda w=own, x=x, f=multiply: f(x, w), 2.0 * rows * inputs * outputs))
    return mean((median(maps), median(linears)))


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _least(work: Callable[[], Any]) -> float:
    work()
    return min(_seconds(work) for _ in range(_TURNS))
