"""Predicted seconds: a roofline. Each operator takes as long as its arithmetic or its memory traffic, whichever is more (Williams,
Waterman and Patterson, "Roofline", CACM 2009); on a CPU also its start, which a GPU does while it computes what is before."""

from __future__ import annotations

from .hardware import CPU_PROVIDER, Hardware
from .memory import Footprint, Shape
from .plan import Placement

_HOST_BANDWIDTH = 2e10  # bytes/s; one channel of DDR4-2400
SCORE_PASSES = 4  # over stored scores: written, read and written by softmax, read
# Of a weight, on two cores: quantised while it is loaded (kernels/quantise.py), and then packed by oneDNN (SD 1.5: 3.4 s).
QUANTISE_SECONDS = {"int8": 3e-9, "int8-dynamic": 3e-9, "int4": 12e-9}
PACK_SECONDS = 4e-9
ONNX_SHARE = 0.67  # of torch's time in fp32 on a CPU: 4.0 s of 6.0 a step of SD 1.5 at 512 (benchmarks/onnx.py)
SESSION_SECONDS = 2e-4  # of ONNX Runtime to prepare an operator of a graph
BLOCK_PASSES = 6  # over a block's fp32 scores in `chunked`: maximum, difference, exponential, sum and the products


def call_seconds(hardware: Hardware, placement: Placement, footprint: Footprint) -> float:
    """One call of a component whose weights are loaded, or stream in."""
    rates, bandwidth = {kind: hardware.rate(kind or placement.compute) for kind in ("", "int8")}, hardware.bandwidth
    if placement.backend == "onnx" and hardware.device == "cpu":
        rates = {kind: rate / ONNX_SHARE for kind, rate in rates.items()}
    if placement.provider == CPU_PROVIDER and hardware.device != "cpu":
        rates, bandwidth = dict.fromkeys(rates, hardware.host_rate), _HOST_BANDWIDTH
    torchs, seconds = placement.backend == "torch", 0.0
    for each in footprint.trace.operations:
        work = max(each.flops / rates.get(each.kind, rates[""]), each.bytes / bandwidth)
        start = hardware.start(each.kind) if torchs else hardware.call_seconds
        seconds += work + start if torchs and hardware.device == "cpu" else max(work, start)
    seconds += sum(attention_seconds(hardware, placement, shape) for shape in footprint.trace.attentions)
    if not footprint.streamed:
        return seconds
    if hardware.device == "cuda":  # the next block is copied while this one computes
        return max(seconds, footprint.streamed / hardware.bus)
    return seconds + footprint.streamed / hardware.read


def attention_seconds(hardware: Hardware, placement: Placement, shape: Shape) -> float:
    batch, heads, n, m, d = shape
    size = 4 if placement.compute == "fp32" else 2
    flops, scores = 4.0 * batch * heads * n * m * d, float(batch * heads * n * m)
    moved = 2.0 * batch * heads * (n + m) * d * size
    kind, rate = placement.attention, hardware.rate(placement.compute)
    least = max(moved / hardware.bandwidth, _starts(kind, shape, size) * hardware.call_seconds)
    if measured := hardware.attention_rates.get(f"{placement.compute}/{kind}"):
        return max(flops / measured, least)
    if kind == "chunked":
        return max(flops / hardware.rate("fp32") + BLOCK_PASSES * 4 * scores / hardware.bandwidth, least)
    if kind == "sliced":
        return max(flops / rate + SCORE_PASSES * size * scores / hardware.bandwidth, least)
    if not hardware.fused_attention:  # torch then stores the scores, in fp32
        return max(flops / hardware.rate("fp32") + SCORE_PASSES * 4 * scores / hardware.bandwidth, least)
    return max(flops / rate, least)


def _starts(kind: str, shape: Shape, size: int) -> int:
    """Operators that an attention starts: four for each slice, twelve for each block."""
    from ..kernels.attention import block, slice_rows

    batch, heads, n, m, d = shape
    if kind == "sliced":
        return 4 * batch * heads * -(-n // slice_rows(m, size))
    if kind == "chunked":
        rows, columns = block(batch * heads, m, d)
        return 12 * -(-n // rows) * -(-m // columns)
    return 1
