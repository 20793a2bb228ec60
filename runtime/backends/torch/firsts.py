"""What a CPU takes for a network once, before its rates count: seconds of Python that builds and fills it and
counts its first call, of quantising, and of oneDNN that makes products ready."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ....kernels import onednn
from ....kernels.formats import FORMATS
from ....kernels.quantise import quantise
from ....kernels.recipe import recipe
from ...costs.footprint import Footprint
from ...costs.latency import call_seconds
from ...machine.hardware import Hardware
from ...models.families.family import Extent
from ...models.hub import inspect
from ...models.spec import Component, ModelSpec
from ...placement import STORED, Placement
from . import dryrun, loading, networks
from .backend import TorchBackend
from .quantised import quantised_layers

# Channels and side of maps, and rows, inputs and outputs, that nothing else here has: small as the emoji's,
# and as large as SD 1.5's.
_MAPS = (96, 12), (160, 10), (224, 24), (352, 28), (672, 20)
_LINEARS = (144, 96, 128), (100, 160, 192), (288, 256, 768), (1152, 384, 384), (784, 704, 1408)


def network_starts(hardware: Hardware) -> dict[str, float]:
    """Seconds that come by the part and not by the byte: of a module that is built and one that is called, a
    tensor that is filled or packed, a layer that is quantised or dequantised, an operator whose bytes are
    counted. They are what the rates of `hardware` leave of the emoji's U-Net, which has so few weights that
    little else takes time: once each, as a loop of one thing is a third faster than what comes once."""
    ways = _ways(hardware)
    _, taken = _turn(ways), _turn(ways)  # the first makes products ready
    spec, component, extent = network()
    own = {kind: dryrun.footprint(spec, component, way, hardware, extent) for kind, way in ways.items()}
    return _of_loading(hardware, taken, own) | _of_calls(hardware, taken, own)


def network() -> tuple[ModelSpec, Component, Extent]:
    """What `network_starts` calls."""
    spec = inspect("emoji")
    return spec, spec.denoiser, Extent(1, 64, 64)


def _ways(hardware: Hardware) -> dict[str, Placement]:
    """By the kind of weights: plain ones, and stored ones in what is preferred to compute in."""
    preferred = hardware.precisions[0]
    computes = {"fp32": "fp32", preferred: preferred, **dict.fromkeys(STORED, preferred)}
    return {
        kind: Placement("torch", kind, compute, "staged", "sdpa", "whole")
        for kind, compute in computes.items()
    }


def _turn(ways: Mapping[str, Placement]) -> dict[str, float]:
    """Seconds of the network in each way: to load, to call again, and what the first call took more."""
    spec, component, extent = network()
    engine = TorchBackend("cpu")
    inputs: dict[str, Any] = {
        name: np.zeros(shape, np.float32) for name, shape in spec.inputs(component, *extent).items()
    }
    module = networks.build(component, ways["fp32"], "cpu")
    stored = loading.match(component, module)
    seconds = {"fill": _seconds(lambda: loading.fill(module, stored, torch.float32, engine.device))}
    for kind, way in ways.items():
        start = time.perf_counter()
        session = engine.load(component, way)
        seconds[f"{kind}/load"] = time.perf_counter() - start
        first, seconds[f"{kind}/call"] = (_seconds(lambda own=session: own(**inputs)) for _ in range(2))
        seconds[f"{kind}/count"] = max(0.0, first - seconds[f"{kind}/call"])
        session.close()
    return seconds


def _of_loading(
    hardware: Hardware, taken: Mapping[str, float], own: Mapping[str, Footprint]
) -> dict[str, float]:
    """Of what comes once, first calls included."""
    _, component, _ = network()
    plain, tensors = own["fp32"], len(component.tensors)
    ways = _ways(hardware)
    starts = {
        "fill": taken["fill"] / tensors,
        "build": max(0.0, taken["fp32/load"] - taken["fill"]) / plain.modules,
        "count": taken["fp32/count"] / len(plain.trace.operations),
    }
    if "bf16" in ways and component.is_ordered(ways["bf16"]):
        starts["pack"] = max(0.0, taken["bf16/load"] - taken["fp32/load"]) / tensors
    for kind in STORED:  # int4's first and last layers are int8
        left = taken[f"{kind}/load"] - taken["fp32/load"]
        layers = quantised_layers(networks.build(component, ways[kind], "cpu")).values()
        kinds = Counter(layer.form.kind for layer in layers)
        left -= sum(
            math.prod(layer.shape) / hardware.moves[f"{layer.form.kind}/quantise"] for layer in layers
        )
        left -= sum(starts.get(f"{one}/quantise", 0.0) * count for one, count in kinds.items())
        starts[f"{kind}/quantise"] = max(0.0, left) / kinds[kind]
    trace = own["int8"].trace
    left = taken["int8/count"] - starts["count"] * len(trace.operations)
    return starts | {"unpack/count": max(0.0, left) / trace.unpacks}


def _of_calls(
    hardware: Hardware, taken: Mapping[str, float], own: Mapping[str, Footprint]
) -> dict[str, float]:
    """Of a module that is called, and of a weight of 8 and of 4 bits that is dequantised."""
    starts = dict(hardware.starts)
    for kind, way in _ways(hardware).items():
        trace = own[kind].trace
        unpacks = {"int8": "unpack", "int4": "unpack4"}.get(kind)
        count = sum(one.kind == unpacks for one in trace.operations) if unpacks else len(trace.calls)
        start = unpacks or f"{way.compute}/module"
        starts[start] = 0.0
        left = taken[f"{kind}/call"] - call_seconds(replace(hardware, starts=starts), way, own[kind])
        starts[start] = max(0.0, left) / count
    return starts


def quantising(kind: str) -> float:
    """Weights/s that become int8 or int4, two thirds of them 3x3 convolutions', as in SD 1.5's U-Net: to int4
    these are a third as fast as linear layers'."""
    weights = torch.randn(640, 640, 3, 3), torch.randn(1280, 1280)
    forms = [FORMATS[recipe(kind, "layer", weight.shape) or kind] for weight in weights]
    _, seconds = (_seconds(lambda: [*map(quantise, weights, forms)]) for _ in range(2))
    return sum(weight.numel() for weight in weights) / seconds


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
