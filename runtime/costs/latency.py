"""Predicted seconds, by a roofline: each operator takes as long as its arithmetic or its memory traffic,
whichever is longer (Williams, Waterman and Patterson, "Roofline", CACM 2009). A CPU also pays each operator's
start, which a GPU overlaps with the work before it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise

from ...kernels.blocks import block, slice_rows
from ..machine.hardware import Hardware
from ..machine.providers import CPU_PROVIDER
from ..models.tensors import Tensor
from ..placement import COMPUTES, DYNAMIC, GRAPHS, Placement
from ..ring import Ring, ahead
from .footprint import Footprint, Shape

_HOST_BANDWIDTH = 2e10  # bytes/s; one channel of DDR4-2400
SCORE_PASSES = 4  # over stored scores: written, read and written by softmax, read
# Of a machine that was not calibrated, as measured on two cores: weights/s that are quantised at load
# (kernels/quantise.py); and seconds, most of them Python's, of a module that is called, one that is built, a
# tensor that is filled, one more in a packed network, a layer that is quantised, an operator of the first
# call of a size, which is counted, more of one that dequantises, and of oneDNN to make a product ready, by
# Trace.readying.
_QUANTISED = {"int8": 3.3e8, "int4": 5.5e7}
_FIRSTS = {
    "module": 5e-5,
    "build": 2.5e-4,
    "fill": 2e-4,
    "pack": 1.2e-4,
    "int8/quantise": 4e-4,
    "int4/quantise": 1e-3,
    "count": 5e-5,
    "unpack/count": 3e-4,
    "first": 2e-5,
}
PACK_SECONDS = 4e-9  # per weight on two cores, by oneDNN for products of integers (SD 1.5: 3.4 s)
# Per weight that adapters change, on two cores: into fp32 and back; and per operation on it.
PATCH_SECONDS, PATCHED_FLOP_SECONDS = 0.3e-9, 1.2e-11
DECODE_SECONDS = 5e-9  # per weight that is stored encoded
# Of the host, whatever runs the networks: a picture's scheduler and text, its PNG by its pixels, and a step
# of the scheduler. In batches of 16 emoji, 4 steps, that is 7.6 ms at 64x64 and 11 at 96x96 (one core).
PICTURE_SECONDS, PIXEL_SECONDS, STEP_SECONDS = 3e-3, 0.3e-6, 0.8e-3
# Seconds of engines that run graphs, of torch's on a CPU, by what they compute in. ONNX Runtime takes 4.0 s
# of 6.0 a step of SD 1.5 at 512 (benchmarks/onnx.py), OpenVINO 0.92 of torch in bf16 and 0.67 in fp32
# on an AMD EPYC, 1.0 and 0.9 on a Xeon with AMX (docs/decisions.md).
SHARES = {"onnx": dict.fromkeys(COMPUTES, 0.67), "openvino": {"fp32": 0.80, "bf16": 0.97, "fp16": 0.97}}
PAGEABLE = 2.0  # times as long as from pinned memory: assumed, benchmarks/gpu_probe.py measures it
PIN_SECONDS = 1 / 3e9  # per byte, once per pipeline: assumed too
BLOCK_PASSES = 6  # over a block's fp32 scores in `chunked`: maximum, difference, exponential, sum, products


def call_seconds(hardware: Hardware, placement: Placement, footprint: Footprint) -> float:
    """Seconds of one call, with weights loaded or streamed."""
    head, spans = arrival_spans(hardware, placement, footprint)
    if hardware.device == "cpu" and placement.backend not in GRAPHS:
        head += len(footprint.trace.calls) * first_seconds(hardware, "module", placement.compute)
        head += footprint.flowing * first_seconds(hardware, "fill")
    if not spans:
        return head
    if hardware.device != "cuda":  # read from files between operators
        reading = reading_seconds(hardware, footprint.stored, footprint.converted, placement.compute)
        return head + sum(spans) + reading + footprint.patching_seconds
    return head + streamed_seconds(footprint, spans, bus_rate(hardware, footprint))


def reading_seconds(hardware: Hardware, stored_bytes: int, converted: int, compute: str) -> float:
    """To read bytes from the files, `converted` values of which become another type."""
    return stored_bytes / hardware.read + converted / hardware.moves.get(compute, math.inf)


def filling_seconds(
    hardware: Hardware, placement: Placement, footprint: Footprint, tensors: int, packed: bool
) -> float:
    """Beside reading: to build a network, to take memory for it, to fill `tensors` of its own, some of which
    are `packed`, and what a first call takes more than others, as its bytes are counted and its products made
    ready."""
    if hardware.device != "cpu" or placement.backend in GRAPHS:
        return 0.0
    filling = first_seconds(hardware, "fill") + (first_seconds(hardware, "pack") if packed else 0.0)
    return (
        footprint.modules * first_seconds(hardware, "build")
        + tensors * filling
        + footprint.held_bytes / hardware.moves.get("fresh", math.inf)
        + len(footprint.trace.operations) * first_seconds(hardware, "count")
        + footprint.trace.unpacks * first_seconds(hardware, "unpack/count")
        + footprint.trace.readying * first_seconds(hardware, "first", placement.compute)
    )


def first_seconds(hardware: Hardware, kind: str, compute: str = "") -> float:
    """Of one of _FIRSTS on a CPU, in `compute` if that matters."""
    return hardware.starts.get(f"{compute}/{kind}" if compute else kind, _FIRSTS[kind])


def quantising_seconds(hardware: Hardware, precision: str, layers: int, weights: int) -> float:
    """To quantise plain weights at load, which the host does."""
    kind = f"{'int8' if precision == DYNAMIC else precision}/quantise"
    return layers * first_seconds(hardware, kind) + weights / hardware.moves.get(
        kind, _QUANTISED[kind.partition("/")[0]]
    )


def compiling_seconds(device: str, kinds: int) -> float:
    """To compile so many kinds of blocks: 19 of SD 1.5 took 115 s on two cores. For a GPU Flux's two took
    9.6 s on an H100 (torch's devlog "torch.compile and Diffusers", May 2026)."""
    return kinds * (6.0 if device == "cpu" else 4.8)


def converted_values(tensors: Iterable[Tensor], compute: str) -> int:
    """Of plain tensors, those in another type than `compute`."""
    held = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}[compute]
    return sum(one.count for one in tensors if one.dtype[0] in "BF" and one.dtype != held)


def read_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the files, to read the tensors and what their patches are made of once."""
    return sum(
        tensor.stored_bytes
        + sum(
            part.stored_bytes
            for beside in (*tensor.patches, tensor.encoding)
            if beside
            for part in beside.tensors
        )
        for tensor in tensors
    )


def patching_seconds(tensors: Iterable[Tensor]) -> float:
    """To decode tensors and apply their patches once, when all is read."""
    return sum(tensor.count * _patching_seconds(tensor) for tensor in tensors)


def _patching_seconds(tensor: Tensor) -> float:
    flops = sum(patch.flops for patch in tensor.patches)
    patching = PATCH_SECONDS + PATCHED_FLOP_SECONDS * flops if tensor.patches else 0.0
    return patching + (DECODE_SECONDS if tensor.encoding else 0.0)


def arrival_spans(
    hardware: Hardware, placement: Placement, footprint: Footprint
) -> tuple[float, list[float]]:
    """Seconds of computing before the first streamed weight is needed, and from each arrival to the next."""
    trace = footprint.trace
    on_device = placement.provider != CPU_PROVIDER or hardware.device == "cpu"
    share = hardware.efficiency.get(placement.compute, 1.0) if on_device else 1.0
    work = _sums(_operation_seconds(hardware, placement, footprint, share))
    attention = _sums(attention_seconds(hardware, placement, shape) / share for shape in trace.attentions)
    # ONNX Runtime issues operators in C++; `call_seconds` covers that
    at_once = placement.backend in GRAPHS or placement.captured or hardware.device == "cpu"
    issue_seconds = 0.0 if at_once else hardware.operator_seconds

    def between(begin: tuple[int, int], end: tuple[int, int]) -> float:
        """Seconds between two places of the call, each given in operations and attentions. A GPU computes
        while the host issues the next operator."""
        (first, a), (last, b) = begin, end
        return max(
            work[last] - work[first] + attention[b] - attention[a], issue_seconds * (last - first + b - a)
        )

    places = [(arrival.operation, arrival.attention) for arrival in footprint.arrivals]
    places = [(0, 0), *places, (len(trace.operations), len(trace.attentions))]
    head, *spans = [between(*pair) for pair in pairwise(places)]
    return head, spans


def _operation_seconds(
    hardware: Hardware, placement: Placement, footprint: Footprint, share: float
) -> Iterator[float]:
    rates, bandwidth = (
        {kind: hardware.rate(kind or placement.compute) for kind in ("", "int8", "unpack", "unpack4")},
        hardware.bandwidth,
    )
    if placement.packed:
        rates[""] = hardware.rates.get(f"{placement.compute}/packed", rates[""])
    if placement.backend in GRAPHS and hardware.device == "cpu":
        share_of_torchs = SHARES[placement.backend][placement.compute]
        rates = {kind: rate / share_of_torchs for kind, rate in rates.items()}
    if placement.provider == CPU_PROVIDER and hardware.device != "cpu":
        rates, bandwidth = dict.fromkeys(rates, hardware.host_rate), _HOST_BANDWIDTH
    torchs = placement.backend not in GRAPHS
    starts = {
        kind: hardware.starts.get(kind, hardware.start(kind.rstrip("4"))) if torchs else hardware.call_seconds
        for kind in ("", "product", "int8", "unpack", "unpack4")
    }
    if torchs:
        starts["product"] = hardware.starts.get(f"{placement.compute}/product", starts["product"])
    plain_start = hardware.starts.get(f"{placement.compute}/plain", starts["product"])
    summed = torchs and hardware.device == "cpu"
    plain = hardware.rates.get(f"{placement.compute}/plain", rates[""])
    order = hardware.moves.get(f"{placement.compute}/order", math.inf)
    light = hardware.moves.get(f"{placement.compute}/light", bandwidth) if summed else bandwidth
    known: dict[int, float] = {}  # blocks that are alike share their operations
    for operation in footprint.trace.operations:
        if id(operation) not in known:
            rate = plain if operation.packed else rates.get(operation.kind, rates[""])
            moving = operation.bytes / (bandwidth if operation.kind else light)
            work = max(operation.flops / rate, moving) / share + operation.packed / order
            start = plain_start if operation.packed else starts[operation.kind]
            known[id(operation)] = work + start if summed else max(work, start)
        yield known[id(operation)]


def streamed_seconds(footprint: Footprint, spans: Sequence[float], bus: float) -> float:
    """Steady-state seconds per call when weights are copied at `bus` bytes/s into a shared buffer, each as
    soon as there is room, while the component computes. `spans` are the seconds from one unit's arrival to
    the next's."""
    ring: Ring[str] = Ring(footprint.ring)
    order = [arrival.unit for arrival in footprint.arrivals]
    sizes = {arrival.unit: arrival.bytes for arrival in footprint.arrivals}
    copied = computed = 0.0
    arrived, used = dict.fromkeys(sizes, 0.0), dict.fromkeys(sizes, 0.0)

    def copy(unit: str, gone: Sequence[str]) -> None:
        nonlocal copied
        copied = arrived[unit] = max(copied, *(used[evicted] for evicted in gone), 0.0) + sizes[unit] / bus

    ends = []
    for _ in range(2):  # the first starts with an empty buffer
        for i, unit in enumerate(order):
            if unit not in ring:
                copy(unit, ring.put(unit, sizes[unit]) or ())
            for following, gone in ahead(ring, unit, (*order[i + 1 :], *order[:i]), sizes):
                copy(following, gone)
            computed = used[unit] = max(computed, arrived[unit]) + spans[i]
        ends.append(computed)
    return ends[1] - ends[0]


def bus_rate(hardware: Hardware, footprint: Footprint) -> float:
    """Bytes/s from the host; what cannot be pinned is copied once more by the host."""
    pinned = min(1.0, hardware.pinnable_bytes / footprint.host) if footprint.host else 1.0
    return hardware.bus / (pinned + (1 - pinned) * PAGEABLE)


def _sums(values: Iterable[float]) -> list[float]:
    """Running sums, from 0."""
    return list(accumulate(values, initial=0.0))


def attention_seconds(hardware: Hardware, placement: Placement, shape: Shape) -> float:
    batch, heads, n, m, d = shape
    size = 4 if placement.compute == "fp32" else 2
    flops, scores = 4.0 * batch * heads * n * m * d, float(batch * heads * n * m)
    moved = 2.0 * batch * heads * (n + m) * d * size
    kind, rate = placement.attention, hardware.rate(placement.compute)
    least = max(moved / hardware.bandwidth, _starts(kind, shape, size) * hardware.call_seconds)
    if measured := hardware.attention_rates.get(f"{placement.compute}/{kind}"):
        start = hardware.starts.get(f"{placement.compute}/{kind}", 0.0)
        return max(flops / measured, least) + start * _share_of_start(placement, shape)
    if kind == "chunked":
        return max(flops / hardware.rate("fp32") + BLOCK_PASSES * 4 * scores / hardware.bandwidth, least)
    if kind == "sliced":
        return max(flops / rate + SCORE_PASSES * size * scores / hardware.bandwidth, least)
    if not hardware.fused_attention:  # torch then stores the scores, in fp32
        return max(flops / hardware.rate("fp32") + SCORE_PASSES * 4 * scores / hardware.bandwidth, least)
    return max(flops / rate, least)


def _share_of_start(placement: Placement, shape: Shape) -> float:
    """Of what an attention was measured to take with nothing to do, which is for two rows of eight heads."""
    batch, heads, *_ = shape
    if placement.attention != "sliced":
        return 1.0
    return batch / 2 if placement.compute == "bf16" else batch * heads / 16


def _starts(kind: str, shape: Shape, size: int) -> int:
    """Operators that an attention starts: four per slice, twelve per block."""
    batch, heads, n, m, d = shape
    if kind == "sliced":
        return 4 * batch * heads * -(-n // slice_rows(m, size))
    if kind == "chunked":
        rows, columns = block(batch * heads, m, d)
        return 12 * -(-n // rows) * -(-m // columns)
    return 1
