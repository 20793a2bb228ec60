"""This machine's rates, measured once and kept: the constants of the roofline in latency.py."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ....kernels import onednn
from ...errors import TightfitError
from ...files import parsed, read_bytes, replacing
from ...machine.detect import calibration_file
from ...machine.hardware import Hardware
from ...machine.process import cores
from ...placement import ATTENTIONS, STORED
from . import firsts
from .autotune import turn_seconds
from .networks import DTYPES

_TURNS = 3
_LEAST_SECONDS = 0.1  # for which one measurement is repeated; the fastest turn counts


def calibrate(hardware: Hardware) -> dict[str, Any]:
    """Measured rates of `hardware`'s device, as fields of Hardware: the medians of three turns, as a host
    that others use is faster or slower from one quarter of a minute to the next. Takes under a minute."""
    fields = _median([_measured(hardware) for _ in range(_TURNS)])
    if hardware.device == "cpu":  # once, as later calls are not the first
        with torch.inference_mode():
            firsts_of = {f"{kind}/first": firsts.readying(DTYPES[kind]) for kind in hardware.precisions}
        fields["starts"] |= firsts_of
    return fields


def _median(turns: Sequence[Any]) -> Any:
    """Of numbers, or of dictionaries of them."""
    if isinstance(turns[0], dict):
        return {kind: _median([turn[kind] for turn in turns]) for kind in turns[0]}
    return median(turns)


def _measured(hardware: Hardware) -> dict[str, Any]:
    device, rates, moves = torch.device(hardware.device), {}, {}
    preferred, attentions, on_cpu = DTYPES[hardware.precisions[0]], {}, device.type == "cpu"
    with torch.inference_mode():
        starts = _starts(hardware, device, preferred)
        for precision in hardware.precisions:
            dtype = DTYPES[precision]
            packs = on_cpu and onednn.multiplies(dtype)
            rates[precision] = _mixed_rate(device, dtype, packs and precision == "bf16")
            if packs and precision == "fp32":
                rates["fp32/packed"] = _mixed_rate(device, dtype, packs)
            attentions |= {f"{precision}/{kind}": rate for kind, rate in _attention_rates(device, dtype)}
            if on_cpu:
                plain = f"{precision}/plain"
                rates[plain], moves[f"{precision}/order"], starts[plain] = _plain_rates(dtype)
                moves |= {precision: _conversion_rate(dtype), f"{precision}/light": _light_rate(dtype)}
                starts[f"{precision}/product"] = _product_start(dtype)
                starts |= {f"{precision}/{kind}": seconds for kind, seconds in _attention_starts(dtype)}
        if on_cpu:
            moves |= {f"{kind}/quantise": firsts.quantising(kind) for kind in STORED}
            rates |= _unpacking_rates(preferred, starts["unpack"])
            rates |= {"int8": _int8_rate()} if "int8" in hardware.rates else {}
            moves["fresh"] = _fresh_rate()
        block = torch.ones(2**26, device=device)
        target = torch.empty_like(block)
        copy = _fastest(lambda: target.copy_(block), device)
        host = torch.ones(2**26)
        if device.type == "cuda":
            host = host.pin_memory()
        bus = _fastest(lambda: target.copy_(host, non_blocking=True), device)
        tiny = torch.ones(8, device=device)
        start = _fastest(lambda: [tiny.add(1) for _ in range(1000)], device) / 1000
        operators: dict[str, Any] = {"cores": cores()} if on_cpu else {}
        if device.type in ("cuda", "xpu"):
            operators = {"operator_seconds": operator_seconds(device, preferred)}
    fields = {
        "rates": rates,
        "attention_rates": attentions,
        "bandwidth": 2.0 * block.nbytes / copy,
        "bus": host.nbytes / bus,
        "call_seconds": start,
        "starts": starts,
        "moves": moves,
        "read": _read_rate(),
    }
    if on_cpu:
        starts |= firsts.network_starts(replace(hardware, **fields | {"efficiency": {}}))
    return fields | operators


def _attention_rates(device: Any, dtype: Any) -> Iterator[tuple[str, float]]:
    """FLOP/s of each attention: half of SD 1.5's largest at 512x512."""
    from ....kernels.attention import VARIANTS

    q, k, v = (torch.randn(1, 4096, 8, 40, device=device).to(dtype).transpose(1, 2) for _ in range(3))
    for kind in ATTENTIONS:
        seconds = _fastest(lambda attend=VARIANTS[kind]: attend(q, k, v), device)
        yield kind, 4.0 * 8 * 4096 * 4096 * 40 / seconds


def _attention_starts(dtype: Any) -> Iterator[tuple[str, float]]:
    """Seconds of each attention on a CPU where there is next to nothing to do."""
    from ....kernels.attention import VARIANTS

    q, k, v = (torch.randn(2, 16, 8, 40).to(dtype).transpose(1, 2) for _ in range(3))
    for kind in ATTENTIONS:
        yield kind, _fastest(lambda attend=VARIANTS[kind]: attend(q, k, v), None)


def save(hardware: Hardware, rates: dict[str, Any]) -> Path:
    """Store `rates` for the next `Hardware.detect`. Returns the file."""
    file = calibration_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            entries = dict(parsed(read_bytes(file)))
        except (FileNotFoundError, ValueError, TypeError):
            entries = {}
        with replacing(file) as partial:
            partial.write_text(json.dumps(entries | {f"{hardware.device} {hardware.name}": rates}, indent=1))
    except OSError as error:
        raise TightfitError(
            f"{file} cannot be written ({error.strerror}): set XDG_CACHE_HOME to a folder that can"
        ) from None
    return file


def _read_rate() -> float:
    """Bytes/s from a file in the page cache into memory; weights are cached after their first use."""
    from tempfile import TemporaryFile

    target = bytearray(2**27)
    with TemporaryFile() as stream:
        stream.write(target)

        def read() -> None:
            stream.seek(0)
            stream.readinto(target)

        return len(target) / _fastest(read, None)


def _mixed_rate(device: Any, dtype: Any, packs: bool) -> float:
    """FLOP/s over a linear layer and two convolutions of SD 1.5's U-Net at 512x512, timed together."""
    from .packed import pack

    convolutions = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for channels in (320, 1280))
    layers = nn.ModuleList((nn.Linear(640, 2560, bias=False), *convolutions)).to(device, dtype)
    layers.requires_grad_(False)
    shapes = (4096, 640), (2, 320, 64, 64), (2, 1280, 16, 16)
    inputs = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    if packs:  # as a denoiser's are, between others with channels last
        pack(layers)
        maps = (each.contiguous(memory_format=torch.channels_last) for each in inputs[1:])
        inputs = [inputs[0], *maps]
    flops = 2.0 * (4096 * 640 * 2560 + 9 * (2 * 64 * 64 * 320 * 320 + 2 * 16 * 16 * 1280 * 1280))
    return flops / _fastest(lambda: [layer(x) for layer, x in zip(layers, inputs, strict=True)], device)


def _plain_rates(dtype: Any) -> tuple[float, float, float]:
    """Of a convolution on a CPU by weights that are packed in each call: FLOP/s, bytes/s of packing, and the
    seconds of one with next to nothing to do. Timed are large maps of a U-Net and of a VAE, many weights for
    a small map, and few for a small one."""

    def flops(batch: int, channels: int, side: int) -> float:
        return 2.0 * 9 * batch * side * side * channels * channels

    def seconds(batch: int, channels: int, side: int) -> float:
        shapes = (channels, channels, 3, 3), (batch, channels, side, side)
        weight, x = (torch.randn(shape).to(dtype) for shape in shapes)
        return _fastest(lambda: functional.conv2d(x, weight, None, 1, 1), None)

    large, deep = ((2, 320, 64), (1, 256, 128)), (2, 1280, 4)
    rate = sum(flops(*one) for one in large) / sum(seconds(*one) for one in large)
    packing = seconds(*deep) - flops(*deep) / rate
    return rate, 9 * 1280 * 1280 * dtype.itemsize / max(packing, 1e-4), seconds(1, 32, 16)


def _light_rate(dtype: Any) -> float:
    """Bytes/s of what a VAE does between convolutions, read and written."""
    block = nn.Sequential(nn.GroupNorm(32, 128), nn.SiLU()).to(dtype).requires_grad_(False)
    x = torch.randn(1, 128, 128, 128).to(dtype)
    return (4 + 3) * x.nbytes / _fastest(lambda: block(x) + x, None)


def _product_start(dtype: Any) -> float:
    """Seconds of a linear layer with next to nothing to do."""
    layer, x = nn.Linear(64, 64).to(dtype).requires_grad_(False), torch.randn(2, 64, 64).to(dtype)
    return _fastest(lambda: [layer(x) for _ in range(100)], None) / 100


def _conversion_rate(dtype: Any) -> float:
    """Values/s of fp16 that become another type."""
    stored, held = torch.ones(2**24).half(), torch.ones(2**24).to(dtype)
    return len(held) / _fastest(lambda: held.copy_(stored), None)


def _fresh_rate() -> float:
    """Bytes/s of filling memory that the process has not had before, beyond those of writing it."""
    count = 2**24
    held, values = torch.ones(count), torch.ones(count)
    fresh = _fastest(lambda: torch.empty(count).copy_(values), None)
    return held.nbytes / max(fresh - _fastest(lambda: held.copy_(values), None), 1e-4)


def _unpacking_rates(dtype: Any, start: float) -> dict[str, float]:
    """Values/s of dequantising weights of 8 and of 4 bits."""
    from .quantised import filled

    rates = {}
    for kind, form in (("unpack", "int8"), ("unpack4", "int4-g64")):
        layer = nn.Linear(1280, 2560).requires_grad_(False).to(dtype)
        made = filled(layer, torch.randn(2560, 1280), form, "cpu", False)
        rates[kind] = 2560 * 1280 / max(_fastest(made.dense, None) - start, 1e-5)
    return rates


def _starts(hardware: Hardware, device: Any, dtype: Any) -> dict[str, float]:
    """Seconds that a layer with almost no work takes: the mean of a convolution and a linear layer."""
    from .quantised import filled

    def seconds(form: str, dynamic: bool = False) -> list[float]:
        taken = []
        for layer, shape in (
            (nn.Conv2d(32, 32, 3, padding=1), (2, 32, 8, 8)),
            (nn.Linear(64, 64), (2, 64, 64)),
        ):
            plain = layer.requires_grad_(False).to(device, dtype)
            made: Any = (
                filled(plain, layer.weight.float().cpu(), form, device.type, dynamic) if form else plain
            )
            x = torch.randn(shape).to(device, dtype)
            taken.append(_fastest(lambda made=made, x=x: [made(x) for _ in range(100)], device) / 100)
        return taken

    plain = seconds("")
    starts = {"product": mean(plain)}
    if device.type == "cpu":
        starts[""] = _light_start(dtype)
    starts["unpack"] = max(0.0, mean(seconds("int4-g64")) - mean(plain))
    if device.type == "cpu":
        starts |= {"int8": mean(seconds("int8", dynamic=True))} if "int8" in hardware.rates else {}
    return starts


def _light_start(dtype: Any) -> float:
    """Seconds of a norm, an activation or an addition with next to nothing to do."""
    x = torch.randn(2, 32, 8, 8).to(dtype)

    def four() -> None:
        functional.layer_norm(functional.silu(functional.group_norm(x, 8)) + x, (8,))

    return _fastest(lambda: [four() for _ in range(25)], None) / 100


def operator_seconds(device: Any, dtype: Any) -> float:
    """Seconds that the host needs to issue one operator of a network, module overhead included. Measured on a
    residual block and a transformer block so small that the device waits for the host."""
    from .dryrun import Recorder

    conv, linear = (
        (nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1)),
        (nn.LayerNorm(8), nn.Linear(8, 8)),
    )
    network = nn.Sequential(*conv, *linear, *conv, *linear).to(device, dtype).requires_grad_(False)
    x = torch.randn(2, 32, 8, 8).to(device, dtype)
    with Recorder(device.type, False) as seen:
        network(x)
    return _fastest(lambda: network(x), device) / len(seen.operations)


def _int8_rate() -> float:
    """Operations/s of the same convolutions in int8, quantising the inputs included."""
    from ....kernels import int8

    runs, flops = [], 0.0
    for channels, side in ((320, 64), (1280, 16)):
        x = torch.randn(2, channels, side, side).contiguous(memory_format=torch.channels_last)
        packed = torch.randint(-127, 128, (channels, 9 * channels), dtype=torch.int8)
        ready = int8.pack_conv2d(packed, channels, (3, 3), (1, 1), (1, 1))
        runs.append((x, ready, torch.ones(channels, 1).half(), None, (1, 1), (1, 1)))
        flops += 2.0 * x.numel() * packed.shape[1]
    return flops / _fastest(lambda: [int8.conv2d_int8_onednn(*run) for run in runs], None)


def _fastest(work: Callable[[], Any], device: Any) -> float:
    """Seconds per call in the fastest of several turns."""
    work()
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < _LEAST_SECONDS:
        best = min(best, turn_seconds(work, device))
    return best
