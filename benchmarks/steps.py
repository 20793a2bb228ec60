"""Seconds per U-Net call with weights in 16, 8 and 4 bits, in turns in one process, and what each holds.

    python -m tightfit.benchmarks.steps sd15 sd15-int8 sd15-int8:int8-dynamic sd15-int4 --size 512

Models are diffusers folders, plain or from `tightfit export`, optionally with a colon and another precision;
the first is the baseline. Each round calls every one once, so that a slow spell of the machine slows all; the
least of the rounds counts.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from .. import inspect
from ..runtime.backends.torch.backend import TorchBackend
from ..runtime.machine.hardware import Hardware
from ..runtime.models.spec import ModelSpec
from ..runtime.placement import Placement
from ..runtime.units import shown
from .record import named, record


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("models", nargs="+", metavar="MODEL[:PRECISION]")
    parse.add_argument("--size", type=int, default=512)
    parse.add_argument("--rounds", type=int, default=4)
    parse.add_argument("--device", default="auto")
    parse.add_argument("--attention", default="sliced")
    args = parse.parse_args()
    hardware = Hardware.detect(args.device)
    compute = hardware.precisions[0]
    runs, rows = {}, {}
    for model in args.models:
        name, _, precision = model.partition(":")
        spec = inspect(name)
        unet, backend = spec.denoiser, TorchBackend(hardware.device)
        placement = Placement(
            "torch", precision or spec.precision or compute, compute, "resident", args.attention, "whole"
        )
        session = backend.load(unet, placement)
        held = backend.meter.bytes()
        arrays = noise(spec, 2, args.size)
        session(**arrays)
        rows[model] = {
            "stored_bytes": unet.stored_bytes,
            "held_bytes": held,
            "peak_bytes": backend.meter.bytes(),
        }
        runs[model] = lambda session=session, arrays=arrays: session(**arrays)
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(args.rounds):
        for model, run in runs.items():
            start = time.perf_counter()
            run()
            best[model] = min(best[model], time.perf_counter() - start)
    for model, row in rows.items():
        row |= {"seconds": round(best[model], 3), "ratio": round(best[model] / best[args.models[0]], 3)}
        sizes = ", ".join(
            f"{name.removesuffix('_bytes')} {shown(row[name])}" for name in row if name.endswith("_bytes")
        )
        print(f"{model}: {sizes}; {row['seconds']} s, {row['ratio']} of {args.models[0]}'s")
    rows = {named(model): row for model, row in rows.items()}
    record("steps", {"compute": compute, "attention": args.attention, "size": args.size, "rows": rows})


def noise(spec: ModelSpec, batch: int, size: int) -> dict[str, Any]:
    """Inputs of a U-Net in the middle of a picture: reproducible noise in place of latents and texts."""
    random, shapes = np.random.default_rng(0), spec.inputs(spec.denoiser, batch, size, size)
    arrays = {name: np.asarray(random.standard_normal(shape), np.float32) for name, shape in shapes.items()}
    return arrays | {"timestep": np.array(500, np.float32)}


if __name__ == "__main__":
    main()
