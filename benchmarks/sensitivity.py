"""How quantisation changes the noise that a U-Net predicts in one step: all layers, and one layer at a time.

    python -m tightfit.benchmarks.sensitivity sd15 --size 256

In decibels of signal to noise against fp32, for one call with random latents and texts; and the ten layers
that alone change most.
"""

from __future__ import annotations

import argparse
import heapq
import math
import time

import numpy as np
import torch

from .. import inspect
from ..kernels.formats import FORMATS, dequantise
from ..kernels.quantise import quantise
from ..kernels.recipe import recipe
from ..runtime.backends.torch.backend import TorchBackend
from ..runtime.placement import Placement
from .record import record
from .steps import noise


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("model")
    parse.add_argument("--size", type=int, default=256)
    parse.add_argument("--form", default="int4-g64", help="format of the layer that is quantised alone")
    args = parse.parse_args()
    spec, began = inspect(args.model), time.perf_counter()
    unet, backend = spec.denoiser, TorchBackend("cpu")
    arrays = noise(spec, 1, args.size)

    def session(precision: str, compute: str):
        return backend.load(unet, Placement("torch", precision, compute, "resident", "sliced", "whole"))

    plain = session("fp32", "fp32")
    exact = plain(**arrays)[0].astype(np.float64)

    def snr(answer: np.ndarray) -> float:
        return round(10 * math.log10((exact**2).sum() / max(((answer - exact) ** 2).sum(), 1e-30)), 2)

    networks = {}
    for precision in ("int8", "int8-dynamic", "int4"):
        made = session(precision, "fp32")
        networks[precision] = snr(made(**arrays)[0])
        made.close()
        print(f"{precision}: {networks[precision]} dB", flush=True)
    alone, form = {}, FORMATS[args.form]
    assert plain.module is not None
    layers = {
        path: part
        for path, part in plain.module.named_modules()
        if isinstance(part, torch.nn.Linear | torch.nn.Conv2d)
    }
    for path, layer in layers.items():
        kept = layer.weight.data
        if recipe("int8", path, tuple(kept.shape)):
            layer.weight.data = dequantise(quantise(kept, form), form, kept.shape)
            alone[path] = snr(plain(**arrays)[0])
            layer.weight.data = kept
    worst = [
        {"layer": path, "snr": alone[path]}
        for path in heapq.nsmallest(10, alone, key=lambda path: alone[path])
    ]
    for row in worst:
        print(f"{row['layer']} in {args.form}: {row['snr']} dB")
    middle = float(np.median(list(alone.values())))
    seconds = round(time.perf_counter() - began)
    print(f"the median of {len(alone)} layers: {middle:.1f} dB; {seconds} s")
    results = {
        "size": args.size,
        "whole": networks,
        "form": args.form,
        "layers": len(alone),
        "median": middle,
        "worst": worst,
    }
    record("sensitivity", results | {"seconds": seconds})


if __name__ == "__main__":
    main()
