"""Single layers of SD 1.5's U-Net at 512x512, both halves of guidance in a batch, with weights in 16, 8 and 4
bits, and in integers.

    python -m tightfit.benchmarks.layers --device cpu

Reports microseconds per call, int4 dequantisation in GB/s read and written, and integer products in TOP/s,
quantising the inputs included. Compare both with the device's limits (`tightfit calibrate`, or its maker).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..kernels.formats import FORMATS
from ..runtime.backends.torch import quantised
from ..runtime.backends.torch.autotune import turn_seconds
from ..runtime.machine.hardware import Hardware
from .record import record

Shape = tuple[int, int, int, int]
# Pixels or tokens, input channels, output channels, taps of a convolution.
SHAPES: Sequence[Shape] = (
    (2 * 64 * 64, 320, 320, 9),
    (2 * 32 * 32, 640, 640, 9),
    (2 * 16 * 16, 1280, 1280, 9),
    (2 * 64 * 64, 960, 320, 1),
    (2 * 64 * 64, 320, 2560, 0),
    (2 * 16 * 16, 1280, 1280, 0),
    (2 * 77, 768, 1280, 0),
    (2, 1280, 1280, 0),
)
CONTENDERS = (("int8", "int8", False), ("int4", "int4-g64", False), ("int8-dynamic", "int8", True))


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--device", default="cpu")
    results = list[dict[str, Any]]()
    for row in rows(parse.parse_args().device, SHAPES):
        results.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    record("layers", results)


def rows(device: str, shapes: Sequence[Shape]) -> Iterator[dict[str, Any]]:
    """One row per shape, as it is measured. 16 bits are fp16 on a GPU, bf16 elsewhere."""
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    contenders = CONTENDERS if "int8" in Hardware.detect(device).rates else CONTENDERS[:-1]
    for pixels, channels, out, taps in shapes:
        side = round((pixels // 2) ** 0.5)
        shape = (2, channels, side, side) if taps else (2, pixels // 2, channels)
        layer: Any = nn.Conv2d(channels, out, 3, padding=1) if taps == 9 else nn.Conv2d(channels, out, 1)
        layer = (layer if taps else nn.Linear(channels, out)).requires_grad_(False)
        x, weight = torch.randn(shape).to(device, dtype), layer.weight.clone()
        row: dict[str, Any] = {"layer": f"{pixels} x {channels} x {out}" + (f", {taps} taps" if taps else "")}
        layer = layer.to(device, dtype)
        row["16 bits"] = microseconds(partial(layer, x), device)
        for name, form, dynamic in contenders:
            made = quantised.filled(layer, weight, form, device, dynamic)
            row[name] = microseconds(partial(made, x), device)
            if name == "int4":
                moved = FORMATS[form].bytes(tuple(weight.shape)) + weight.numel() * dtype.itemsize
                row["unpacking GB/s"] = round(moved / 1e3 / microseconds(partial(_unpack, made), device), 1)
            if isinstance(made, quantised.LinearInt8):
                row["TOP/s"] = round(2e-6 * pixels * weight.numel() / row[name], 2)
        yield row


def _unpack(layer: quantised.Quantised) -> None:
    for start in range(0, layer.shape[0], layer.at_once):
        layer.dense(start, start + layer.at_once)


@torch.inference_mode()
def microseconds(run: Callable[[], Any], device: str) -> float:
    """The fastest of ten turns of three calls, after a turn that may compile."""
    turns = [turn_seconds(lambda: [run() for _ in range(3)], torch.device(device)) for _ in range(11)]
    return round(min(turns[1:]) / 3e-6, 1)


if __name__ == "__main__":
    main()
