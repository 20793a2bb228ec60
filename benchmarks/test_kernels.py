"""Kernels against their baselines, in the U-Nets' real shapes. Not part of the tests:

    pytest benchmarks --benchmark-group-by=group --benchmark-columns=min,median,stddev,rounds
    pytest benchmarks -k attention --benchmark-json=kernels.json

Each group is one shape and includes its baseline. A result's extra info has GFLOP/s or GB/s, and their share
of what `tightfit calibrate` measured (without it, of an estimate). SD 1.5 is at 512x512 and SDXL at
1024x1024, with both halves of guidance in a batch, except for attention, where one half is as good.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ..kernels import attention, strips
from ..kernels.formats import FORMATS, dequantise, pack, unpack
from ..kernels.quantise import quantise
from ..runtime.backends.torch.quantised import filled
from ..runtime.machine.hardware import Hardware

HERE = Hardware.detect()
DEVICE, DTYPE = (
    torch.device(HERE.device),
    {"fp16": torch.float16, "bf16": torch.bfloat16}.get(HERE.precisions[0], torch.float32),
)
# heads, queries, keys, width of a head
ATTENTIONS = {
    "SD 1.5, 64x64, self": (8, 4096, 4096, 40),
    "SD 1.5, 64x64, text": (8, 4096, 77, 40),
    "SD 1.5, 16x16, self": (8, 256, 256, 160),
    "SDXL, 64x64, self": (10, 4096, 4096, 64),
    "SDXL, 32x32, self": (20, 1024, 1024, 64),
}
# pixels or tokens of one half, in-channels, out-channels
LINEARS = {
    "SD 1.5, feed forward 64x64": (4096, 320, 2560),
    "SD 1.5, 16x16": (256, 1280, 1280),
    "SDXL, 32x32": (1024, 1280, 10240),
}
CONVOLUTIONS = {
    "SD 1.5, 64x64": (4096, 320, 320),
    "SD 1.5, 16x16": (256, 1280, 1280),
    "SDXL, 128x128": (16384, 320, 320),
}
FORMS = {"16 bits": None, "int8": "int8", "int4": "int4-g64"}


# Calls per wait; a single wait would be most of a small call's time.
TURNS = 10 if DEVICE.type == "cuda" else 1


def timed(
    benchmark: Any,
    run: Callable[[], Any],
    group: str,
    flops: float = 0.0,
    bytes_moved: float = 0.0,
    kind: str = HERE.precisions[0],
) -> None:
    """Times a call with this many operations, at the rate of `kind`, and bytes. The roofline is the slower of
    both."""

    def turn() -> None:
        with torch.inference_mode():
            for _ in range(TURNS):
                run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = group
    benchmark(turn)
    if not benchmark.stats:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.min / TURNS
    rates = {"GFLOP/s": flops / seconds / 1e9, "GB/s": bytes_moved / seconds / 1e9}
    benchmark.extra_info |= {unit: round(rate, 1) for unit, rate in rates.items() if rate}
    least = max(flops / HERE.rate(kind), bytes_moved / HERE.bandwidth)
    benchmark.extra_info |= {"calls in a turn": TURNS, "share of roofline": round(least / seconds, 3)}


@pytest.mark.parametrize("shape", ATTENTIONS)
@pytest.mark.parametrize("kind", ["plain", *attention.VARIANTS])
def test_attention(benchmark, kind, shape):
    heads, queries, keys, width = ATTENTIONS[shape]
    q, k, v = (torch.randn(1, heads, length, width).to(DEVICE, DTYPE) for length in (queries, keys, keys))
    run = attention.plain if kind == "plain" else attention.VARIANTS[kind]
    moved = 2.0 * q.nbytes + 2.0 * k.nbytes
    flops = 4.0 * heads * queries * keys * width
    timed(benchmark, lambda: run(q, k, v), f"attention: {shape}", flops, moved)


@pytest.mark.parametrize("shape", LINEARS)
@pytest.mark.parametrize("form", [*FORMS, "int8-dynamic"])
def test_linear(benchmark, form, shape):
    tokens, channels, out = LINEARS[shape]
    x = torch.randn(2, tokens, channels).to(DEVICE, DTYPE)
    layer = made(nn.Linear(channels, out), form)
    moved = x.nbytes * (1 + out / channels) + stored(form, (out, channels))
    timed(benchmark, lambda: layer(x), f"linear: {shape}", 4.0 * tokens * channels * out, moved, rate(form))


@pytest.mark.parametrize("shape", CONVOLUTIONS)
@pytest.mark.parametrize("form", [*FORMS, "int8-dynamic"])
def test_convolution(benchmark, form, shape):
    pixels, channels, out = CONVOLUTIONS[shape]
    side = round(pixels**0.5)
    x = torch.randn(2, channels, side, side).to(DEVICE, DTYPE)
    layer = made(nn.Conv2d(channels, out, 3, padding=1), form)
    moved = x.nbytes * (1 + out / channels) + stored(form, (out, channels, 3, 3))
    timed(
        benchmark,
        lambda: layer(x),
        f"3x3 convolution: {shape}",
        36.0 * pixels * channels * out,
        moved,
        rate(form),
    )


def rate(form: str) -> str:
    return "int8" if form == "int8-dynamic" else HERE.precisions[0]


def stored(form: str, shape: tuple[int, ...]) -> int:
    """Bytes of the weight as it is kept."""
    kept = FORMS[form.removesuffix("-dynamic")]
    return FORMATS[kept].bytes(shape) if kept else math.prod(shape) * DTYPE.itemsize


def made(layer: Any, form: str) -> Any:
    """The layer as a plan in that precision has it."""
    layer, weight = layer.requires_grad_(False), layer.weight.detach().clone()
    layer = layer.to(DEVICE, DTYPE)
    if form == "int8-dynamic":
        if "int8" not in HERE.rates or (DEVICE.type == "cpu" and HERE.precisions[0] == "fp16"):
            pytest.skip("this device has no fast integer products")
        return filled(layer, weight, "int8", str(DEVICE), dynamic=True)
    return (
        layer if FORMS[form] is None else filled(layer, weight, str(FORMS[form]), str(DEVICE), dynamic=False)
    )


@pytest.mark.parametrize("rows", ["whole", "strips"])
def test_vae_block(benchmark, rows):
    """The decoder's last residual block of SD 1.5 at 512x512, of 128 channels: whole, or in strips of
    rows."""
    first, second = (nn.GroupNorm(32, 128).to(DEVICE, DTYPE) for _ in range(2))
    norms = first, second
    convs = tuple(nn.Conv2d(128, 128, 3, padding=1).to(DEVICE, DTYPE) for _ in range(2))
    x = torch.randn(1, 128, 512, 512).to(DEVICE, DTYPE)

    def whole() -> torch.Tensor:
        out = x
        for norm, conv in zip(norms, convs, strict=True):
            out = conv(nn.functional.silu(norm(out)))
        return x + out

    run = whole if rows == "whole" else lambda: strips.residual(strips.Stored(x.clone()), norms, convs)
    timed(benchmark, run, "VAE: residual block", 2 * 18.0 * 512 * 512 * 128 * 128)


@pytest.mark.parametrize("form", ["int8", "int4-g64"])
def test_dequantise(benchmark, form):
    """One 3x3 convolution of 1280 channels, in what is read and written; the baseline is a copy of as much as
    is written."""
    weight = torch.randn(1280, 1280, 3, 3)
    parts = {name: part.to(DEVICE) for name, part in quantise(weight, FORMATS[form]).items()}
    moved = FORMATS[form].bytes(tuple(weight.shape)) + weight.numel() * 4
    timed(
        benchmark,
        lambda: dequantise(parts, FORMATS[form], weight.shape),
        "unpack 1280x1280x3x3",
        bytes_moved=moved,
    )


def test_dequantise_baseline(benchmark):
    weight = torch.randn(1280, 1280, 3, 3).to(DEVICE)
    timed(benchmark, weight.clone, "unpack 1280x1280x3x3", bytes_moved=8.0 * weight.numel())


@pytest.mark.parametrize("direction", ["pack", "unpack", "copy"])
def test_nibbles(benchmark, direction):
    codes = torch.randint(0, 16, (1280, 11520), dtype=torch.uint8, device=DEVICE)
    packed = pack(codes)
    run = {"pack": lambda: pack(codes), "unpack": lambda: unpack(packed, 11520), "copy": codes.clone}[
        direction
    ]
    timed(
        benchmark,
        run,
        "4-bit codes of 1280x11520",
        bytes_moved=codes.numel() * (2.0 if direction == "copy" else 1.5),
    )
