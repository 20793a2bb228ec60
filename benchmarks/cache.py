"""Step caching: what it costs in quality, and what it saves.

    python -m tightfit.benchmarks.cache                               # pictures of the emoji
    python -m tightfit.benchmarks.cache --deepcache                   # by DeepCache's package, if it is here
    python -m tightfit.benchmarks.cache sd15 sd15-int8:int8-dynamic   # seconds of full and shallow calls

Pictures are held against those of the same seed with all steps in full. Pictures and calls are made in turns
in one process, the least of the rounds counts; a step's ratio to the first model's without caching follows
from both, as scheduler and guidance are nothing beside a large U-Net.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .. import Request, inspect, load
from ..runtime.backends.torch.backend import TorchBackend
from ..runtime.machine.hardware import Hardware
from ..runtime.models import schedulers
from ..runtime.models.families.family import KEPT
from ..runtime.placement import Placement
from .metrics import MOST_PSNR, psnr
from .quality import PROMPTS
from .record import named, record
from .steps import noise

Row = dict[str, Any]
_TURNS = 2


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("models", nargs="*", metavar="MODEL[:PRECISION]")
    parse.add_argument("--every", nargs="+", type=int, default=[2, 3, 5])
    parse.add_argument("--steps", nargs="+", type=int, default=[25])
    parse.add_argument("--samplers", nargs="+", default=["dpmpp_2m_karras", "ddim"])
    parse.add_argument("--size", type=int, default=512)
    parse.add_argument("--rounds", type=int, default=3)
    parse.add_argument("--deepcache", action="store_true")
    args = parse.parse_args()
    if args.models:
        rows = calls(args.models, args)
    else:
        way = deepcache if args.deepcache else pictures
        rows = [row for steps in args.steps for row in way(args.samplers, steps, args.every)]
    models = [*map(named, args.models)] or ["emoji"]
    record("cache", {"models": models, "size": args.size, "steps": args.steps[0], "rows": rows})


def pictures(samplers: Sequence[str], steps: int, everies: Sequence[int]) -> list[Row]:
    """PSNR and seconds of eight pictures."""
    with load("emoji", device="cpu", precision="fp32", residency="resident", attention="sdpa") as pipe:

        def paint(sampler: str, every: int, seed: int) -> Any:
            asked = {"scheduler": sampler, "num_inference_steps": steps, "step_cache": every}
            return pipe.generate(Request(PROMPTS[seed], seed=seed, **asked)).images[0]

        return [row for sampler in samplers for row in judged(paint, sampler, steps, everies)]


def deepcache(samplers: Sequence[str], steps: int, everies: Sequence[int]) -> list[Row]:
    """The same of diffusers' pipeline with DeepCache's package, at its branch 0: the same layer is left."""
    from DeepCache import DeepCacheSDHelper  # pyright: ignore[reportMissingImports]
    from diffusers import StableDiffusionPipeline

    spec = inspect("emoji")
    pipe: Any = StableDiffusionPipeline.from_pretrained(spec.folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    helper = DeepCacheSDHelper(pipe=pipe)

    def paint(sampler: str, every: int, seed: int) -> Any:
        pipe.scheduler = schedulers.make(sampler, spec, steps)
        helper.set_params(cache_interval=every, cache_branch_id=0)
        helper.enable()
        options = {"num_inference_steps": steps, "guidance_scale": float(spec.default_guidance)}
        made = pipe(PROMPTS[seed], generator=torch.Generator().manual_seed(seed), **options).images[0]
        helper.disable()
        return made

    rows = [row for sampler in samplers for row in judged(paint, sampler, steps, everies)]
    return [row | {"by": "DeepCache"} for row in rows]


def judged(
    paint: Callable[[str, int, int], Any], sampler: str, steps: int, everies: Sequence[int]
) -> Iterator[Row]:
    """What caching costs and saves beside the same with all steps in full. `paint` takes the sampler, of how
    many steps one is in full, and the seed."""
    seeds, ways = range(len(PROMPTS)), (1, *everies)
    least, made = dict.fromkeys(((way, seed) for way in ways for seed in seeds), float("inf")), {}
    for seed in seeds:
        for way in ways * _TURNS:  # the first of the first plans, and loads
            start = time.perf_counter()
            made[way, seed] = paint(sampler, way, seed)
            least[way, seed] = min(least[way, seed], time.perf_counter() - start)
    seconds = {way: sum(least[way, seed] for seed in seeds) for way in ways}
    for every in everies:
        decibels = [min(psnr(made[every, seed], made[1, seed]), MOST_PSNR) for seed in seeds]
        row = {"sampler": sampler, "steps": steps, "every": every, "ratio": seconds[1] / seconds[every]}
        row |= {"median": float(np.median(decibels)), "worst": min(decibels)}
        print(row, flush=True)
        yield row


def calls(models: Sequence[str], args: argparse.Namespace) -> list[Row]:
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
        row: Row = {
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
