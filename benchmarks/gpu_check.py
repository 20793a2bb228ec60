"""Everything only a GPU can tell, in one command of under nine minutes:

    pip install --no-deps --no-build-isolation -e . && python -m tightfit.benchmarks.gpu_check

It runs the GPU tests; measures every plan's peak beside its prediction in a full-size random SD 1.5, with the allocator
capped at 2, 4, 6 and 8 GB, in fp16 and, of each residency, in 8 and 4 bits, and on ONNX Runtime with its provider for the
device; of a full-size random SDXL in fp16 the fastest of each residency; times our plans beside diffusers' best in the same
process; tells which kernels take the most time; and times single layers (layers.py). Writes gpu_check.jsonl under $OUT, else in
benchmarks/results.
`--tiny --device cpu` rehearses it without a GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from .. import Hardware, Pipeline, Request, TightfitError, Wishes, inspect, load, plan
from ..export import random_model
from . import layers
from .record import record

CAPS = (2, 4, 6, 8)  # decimal gigabytes, as cards are sold
Row = dict[str, Any]


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--device", default="cuda")
    parse.add_argument("--tiny", action="store_true", help="a tiny model, to rehearse this script")
    parse.add_argument("--steps", type=int, default=10)
    args = parse.parse_args()
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(Path(__file__).parents[1] / "tests")], check=False
    )
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "sd1"
        random_model.write("sd1", model, tiny=args.tiny, precision="fp16")
        request = Request("a red heart", seed=0, num_inference_steps=args.steps, scheduler="euler")
        models = [str(model)]
        for kind in (("int8",), ("int4",), ("fp16", "--to", "onnx")):
            models.append(str(Path(folder) / "-".join(kind)))
            export = [sys.executable, "-c", "from tightfit.runtime.cli import main; main()", "export", str(model)]
            subprocess.run([*export, "--precision", *kind, "-o", models[-1]], check=True)
        short = replace(request, num_inference_steps=2)
        rows = capped(contenders(models, args.device), args.device, short)
        rows += speed(models, args.device, request)
        rows += kernels(models[0], args.device, short)
        large = Path(folder) / "sdxl"
        random_model.write("sdxl", large, tiny=args.tiny, precision="fp16")
        rows += capped([(str(large), precision_of(args.device))], args.device, short, every=False)
        rows += layers.rows(args.device, layers.SHAPES[-1:] if args.tiny else layers.SHAPES)
    for line in summary(rows):
        print(line)
    print(f"GPU tests: {'passed' if tests.returncode == 0 else f'exit code {tests.returncode}'}")
    print(record("gpu_check", {"tests_exit_code": tests.returncode, "rows": rows}))


def summary(rows: list[Row]) -> list[str]:
    """What fits on one screen: plans under a cap in a line for each model, with the worst of them; the rest as it is."""
    lines = []
    for (cap, model), group in groupby((row for row in rows if "cap" in row), key=lambda row: (row["cap"], row["model"])):
        own = list(group)
        ran = [row for row in own if "measured" in row]
        worst = max((row["error"] for row in ran), key=lambda error: abs(float(error.rstrip("%"))), default="–")
        over = sum(not row["held"] for row in ran)
        lines.append(
            f"{cap} {model}: {len(ran)} plans ran, worst prediction {worst}, {over} above the cap, {len(own) - len(ran)} failed"
        )
    rest = [row for row in rows if "cap" not in row]
    return lines + ["  ".join(f"{name} {value}" for name, value in row.items()) for row in rest]


def contenders(models: list[str], device: str) -> list[tuple[str, str]]:
    """The plain model and the exported ones, with the precisions they run in on this device; last the one for ONNX Runtime."""
    plain, int8, int4, graph = models
    dynamic = [(int8, "int8-dynamic")] if "int8" in Hardware.detect(device).rates else []
    return [(plain, precision_of(device)), (int8, "int8"), *dynamic, (int4, "int4"), (graph, "auto")]


def precision_of(device: str) -> str:
    return "fp16" if device == "cuda" else "bf16"


def capped(models: list[tuple[str, str]], device: str, request: Request, every: bool = True) -> list[Row]:
    """Plans that fit under each cap: predicted and measured peak. Of quantised models the fastest of each residency; of others all,
    or also only these."""
    rows = []
    hardware = Hardware.detect(device)
    for gigabytes in CAPS:
        chosen = []
        for model, precision in models:
            spec, wishes = inspect(model), Wishes(precision=precision, budget=int(gigabytes * 1e9))
            fitting = [p for p in plan(hardware, spec, request, wishes) if p.fits]
            if spec.precision or not every:
                fitting = list({p.placements["unet"].residency: p for p in reversed(fitting)}.values())
            chosen += [(spec, wishes, one) for one in fitting]
        for spec, wishes, one in chosen:
            row: Row = {
                "cap": f"{gigabytes} GB",
                "model": Path(spec.name).name,
                "plan": one.summary(),
                "predicted": one.predicted.peak_bytes,
            }
            try:
                with Pipeline(spec, hardware, wishes, one) as pipe:
                    result = pipe.generate(request)
            except TightfitError as error:
                rows.append(row | {"failed": str(error)})
                continue
            error = one.predicted.peak_bytes / result.peak_bytes - 1
            stages = {name: (one.predicted.stages[name], result.stages[name].peak_bytes) for name in one.predicted.stages}
            held = result.peak_bytes <= gigabytes * 1e9
            rows.append(row | {"measured": result.peak_bytes, "error": f"{error:+.1%}", "held": held, "stages": stages})
            rows[-1] |= {"seconds": (round(one.predicted.seconds, 3), round(result.seconds, 3)), "notices": result.notices}
        print(f"{gigabytes} GB: {sum(row['cap'] == f'{gigabytes} GB' for row in rows)} plans", flush=True)
    return rows


def diffusers_best(model: str, device: str, compiled: bool) -> Callable[[Request], Any]:
    """diffusers as its documentation makes it fastest: channels last, SDPA (its default), projections fused, compiled if so."""
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    theirs: Any = DiffusionPipeline.from_pretrained(model, dtype=dtype).to(device)
    theirs.scheduler = EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    theirs.fuse_qkv_projections()
    theirs.unet.to(memory_format=torch.channels_last)
    if compiled:
        theirs.unet = torch.compile(theirs.unet, mode="max-autotune-no-cudagraphs", fullgraph=True)
    return lambda request: theirs(request.prompt, num_inference_steps=request.num_inference_steps)


def speed(models: list[str], device: str, request: Request) -> list[Row]:
    """Seconds of a warm run, ours in every precision and diffusers', taken in turns in this process; the best of three each."""
    best: dict[str, float] = {}
    with ExitStack() as stack:
        runs: dict[str, Callable[[], Any]] = {}
        for name, compiled in (("diffusers", False), ("diffusers, compiled", True)):
            if not compiled or device == "cuda":
                runs[name] = partial(diffusers_best(models[0], device, compiled), request)
        for model, precision in contenders(models, device):
            pipe = stack.enter_context(load(model, device=device, residency="resident", precision=precision))
            name = "ONNX Runtime" if pipe.spec.components["unet"].engines == ("onnx",) else precision
            runs[name] = lambda pipe=pipe: pipe.generate(request)
        for _ in range(4):  # the first warms up; a minimum forgets it
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
    other = best["diffusers"]
    return [{"pipeline": name, "seconds": round(each, 3), "of diffusers": round(each / other, 3)} for name, each in best.items()]


def kernels(model: str, device: str, request: Request) -> list[Row]:
    """The ten kernels (on a CPU: operators) that take the most time of a picture, and their shares."""
    from torch.profiler import ProfilerActivity, profile

    gpu = device == "cuda"
    with load(model, device=device, residency="resident", precision=precision_of(device)) as pipe:
        pipe.generate(request)
        with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
            pipe.generate(request)
    field = "self_device_time_total" if gpu else "self_cpu_time_total"
    found = sorted(((getattr(each, field), each.key) for each in seen.key_averages()), reverse=True)
    total = sum(time for time, _ in found) or 1
    return [{"kernel": name[:60], "share": f"{time / total:.1%}"} for time, name in found[:10]]


if __name__ == "__main__":
    main()
