"""Step caching: what it costs in quality, and what it saves.

    python -m tightfit.benchmarks.cache                               # pictures of the emoji
    python -m tightfit.benchmarks.cache sd15 sd15-int8:int8-dynamic   # seconds of full and shallow calls

Pictures are held against those of the same seed with all steps in full. Calls are made in turns in one
process, the least of the rounds counts; a step's ratio to the first model's without caching follows from
both, as scheduler and guidance are nothing beside a large U-Net.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import Request, inspect, load
from ..runtime.backends.torch.backend import TorchBackend
from ..runtime.machine.hardware import Hardware
from ..runtime.models.families.family import KEPT
from ..runtime.placement import Placement
from .metrics import MOST_PSNR, psnr
from .quality import PROMPTS
from .record import named, record
from .steps import noise


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("models", nargs="*", metavar="MODEL[:PRECISION]")
    parse.add_argument("--every", nargs="+", type=int, default=[2, 3, 5])
    parse.add_argument("--steps", nargs="+", type=int, default=[25])
    parse.add_argument("--samplers", nargs="+", default=["dpmpp_2m_karras", "ddim"])
    parse.add_argument("--size", type=int, default=512)
    parse.add_argument("--rounds", type=int, default=3)
    args = parse.parse_args()
    if args.models:
        rows = calls(args.models, args)
    else:
        rows = [row for steps in args.steps for row in pictures(args.samplers, steps, args.every)]
    models = [*map(named, args.models)] or ["emoji"]
    record("cache", {"models": models, "size": args.size, "steps": args.steps[0], "rows": rows})


def pictures(samplers: Sequence[str], steps: int, everies: Sequence[int]) -> list[dict[str, Any]]:
    """PSNR and seconds of eight pictures."""
    rows = []
    with load("emoji", device="cpu", precision="fp32", residency="resident", attention="sdpa") as pipe:
        for sampler in samplers:

            def paint(every: int, sampler: str = sampler) -> tuple[list[Any], float]:
                asked = {"scheduler": sampler, "num_inference_steps": steps, "step_cache": every}
                requests = [Request(prompt, seed=n, **asked) for n, prompt in enumerate(PROMPTS)]
                pipe.generate(requests[0])  # planned, and loaded
                start = time.perf_counter()
                return [pipe.generate(request).images[0] for request in requests], time.perf_counter() - start

            exact, seconds = paint(1)
            for every in everies:
                made, took = paint(every)
                decibels = [min(psnr(*pair), MOST_PSNR) for pair in zip(made, exact, strict=True)]
                row = {"sampler": sampler, "steps": steps, "every": every, "ratio": seconds / took}
                row |= {"median": float(np.median(decibels)), "worst": min(decibels)}
                print(row, flush=True)
                rows.append(row)
    return rows


def calls(models: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of calls of U-Nets, plain, full and shallow, and what caching makes of them."""
    hardware, runs, full, precisions = Hardware.detect("cpu"), {}, {}, {}
    for model in models:
        name, _, precision = model.partition(":")
        spec = inspect(name)
        compute, backend = hardware.precisions[0], TorchBackend(hardware.device)
        kind = precisions[model] = precision or spec.precision or compute
        placement = Placement("torch", kind, compute, "resident", "sliced", "whole")
        session, arrays = backend.load(spec.denoiser, placement), noise(spec, 2, args.size)
        _, kept = session(caching=True, **arrays)
        job = Request("a", num_inference_steps=args.steps[0], scheduler="ddim").resolve(spec)
        full = {every: len(job.full_steps(every)) for every in args.every}
        runs[model] = {
            "plain": lambda session=session, arrays=arrays: session(**arrays),
            "full": lambda session=session, arrays=arrays: session(caching=True, **arrays),
            "shallow": lambda session=session, arrays={**arrays, KEPT: kept}: session(caching=True, **arrays),
        }
    seconds = _least(runs, args.rounds)
    first, rows = next(iter(seconds.values())), []
    whole = min(first["plain"], first["full"])  # the same work
    for model, took in seconds.items():
        name = named(model).partition(":")[0]
        row: dict[str, Any] = {
            "model": name,
            "precision": precisions[model],
            **took,
            "ratio": whole / took["plain"],
        }
        for every, count in full.items():
            average = (count * took["full"] + (args.steps[0] - count) * took["shallow"]) / args.steps[0]
            row |= {f"every {every}": whole / average}
        print(row, flush=True)
        rows.append(row)
    return rows


def _least(runs: dict[str, dict[str, Callable[[], Any]]], rounds: int) -> dict[str, dict[str, float]]:
    least = {model: dict.fromkeys(kinds, float("inf")) for model, kinds in runs.items()}
    for _ in range(rounds):
        for model, kinds in runs.items():
            for kind, run in kinds.items():
                start = time.perf_counter()
                run()
                least[model][kind] = min(least[model][kind], time.perf_counter() - start)
    return least


if __name__ == "__main__":
    main()
