"""This machine's rates, measured once and kept: the constants of the roofline in latency.py."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import TightfitError
from ...files import parsed, read_bytes, replacing
from ...machine.detect import calibration_file
from ...machine.hardware import Hardware
from ...placement import ATTENTIONS
from .autotune import turn_seconds

_LEAST_SECONDS = 0.3  # for which one measurement is repeated; the fastest turn counts


def calibrate(hardware: Hardware) -> dict[str, Any]:
    """Measured rates of `hardware`'s device, as fields of Hardware. Takes about half a minute on an idle
    machine."""
    import torch

    from ....kernels import attention

    device = torch.device(hardware.device)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    rates, attentions = {}, {}
    with torch.inference_mode():
        for precision in hardware.precisions:
            dtype = dtypes[precision]
            rates[precision] = _mixed_rate(device, dtype)
            # half of SD 1.5's largest attention at 512x512
            q, k, v = (torch.randn(1, 4096, 8, 40, device=device).to(dtype).transpose(1, 2) for _ in range(3))
            for kind in ATTENTIONS:
                seconds = _fastest(
                    lambda attend=attention.VARIANTS[kind], q=q, k=k, v=v: attend(q, k, v), device
                )
                attentions[f"{precision}/{kind}"] = 4.0 * 8 * 4096 * 4096 * 40 / seconds
        if "int8" in hardware.rates and device.type == "cpu":
            rates["int8"] = _int8_rate()
        block = torch.ones(2**26, device=device)
        target = torch.empty_like(block)
        copy = _fastest(lambda: target.copy_(block), device)
        host = torch.ones(2**26)
        if device.type == "cuda":
            host = host.pin_memory()
        bus = _fastest(lambda: target.copy_(host, non_blocking=True), device)
        tiny = torch.ones(8, device=device)
        start = _fastest(lambda: [tiny.add(1) for _ in range(1000)], device) / 1000
        starts = _starts(hardware, device, dtypes[hardware.precisions[0]])
        operators = {}
        if device.type in ("cuda", "xpu"):
            operators = {"operator_seconds": operator_seconds(device, dtypes[hardware.precisions[0]])}
    return {
        "rates": rates,
        "attention_rates": attentions,
        "bandwidth": 2.0 * block.nbytes / copy,
        "bus": host.nbytes / bus,
        "call_seconds": start,
        "starts": starts,
        "read": _read_rate(),
    } | operators


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


def _mixed_rate(device: Any, dtype: Any) -> float:
    """FLOP/s over a linear layer and two convolutions of SD 1.5's U-Net at 512x512, timed together."""
    import torch
    from torch import nn

    from .packed import pack, pays

    convolutions = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for channels in (320, 1280))
    layers = nn.ModuleList((nn.Linear(640, 2560, bias=False), *convolutions)).to(device, dtype)
    layers.requires_grad_(False)
    shapes = (4096, 640), (2, 320, 64, 64), (2, 1280, 16, 16)
    inputs = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    if device.type == "cpu" and pays(dtype):  # as a denoiser's are, between others with channels last
        pack(layers)
        maps = (each.contiguous(memory_format=torch.channels_last) for each in inputs[1:])
        inputs = [inputs[0], *maps]
    flops = 2.0 * (4096 * 640 * 2560 + 9 * (2 * 64 * 64 * 320 * 320 + 2 * 16 * 16 * 1280 * 1280))
    return flops / _fastest(lambda: [layer(x) for layer, x in zip(layers, inputs, strict=True)], device)


def _starts(hardware: Hardware, device: Any, dtype: Any) -> dict[str, float]:
    """Seconds that a layer with almost no work takes: the mean of a convolution and a linear layer."""
    import torch
    from torch import nn

    from .quantised import filled

    def seconds(form: str, dynamic: bool = False) -> float:
        total = 0.0
        for layer, shape in (
            (nn.Conv2d(32, 32, 3, padding=1), (2, 32, 8, 8)),
            (nn.Linear(64, 64), (2, 64, 64)),
        ):
            plain = layer.requires_grad_(False).to(device, dtype)
            made: Any = (
                filled(plain, layer.weight.float().cpu(), form, device.type, dynamic) if form else plain
            )
            x = torch.randn(shape).to(device, dtype)
            total += _fastest(lambda made=made, x=x: [made(x) for _ in range(100)], device) / 100
        return total / 2

    starts = {"product": seconds("")}
    starts["unpack"] = max(0.0, seconds("int4-g64") - starts["product"])
    return starts | (
        {"int8": seconds("int8", dynamic=True)} if "int8" in hardware.rates and device.type == "cpu" else {}
    )


def operator_seconds(device: Any, dtype: Any) -> float:
    """Seconds that the host needs to issue one operator of a network, module overhead included. Measured on a
    residual block and a transformer block so small that the device waits for the host."""
    import torch
    from torch import nn

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
    import torch

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
    while time.perf_counter() - began < _LEAST_SECONDS:
        best = min(best, turn_seconds(work, device))
    return best
