"""Everything only a GPU can tell, in one command of under nine minutes:

    pip install --no-deps --no-build-isolation -e . && python -m tightfit.benchmarks.gpu_check

It runs the GPU tests; measures every plan's peak beside its prediction in a full-size random SD 1.5, with the allocator
capped at 2, 4, 6 and 8 GB; and times our plans beside diffusers' own pipeline in the same process. Writes gpu_check.jsonl
under $OUT, else in benchmarks/results. `--tiny --device cpu` rehearses it without a GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import Hardware, Pipeline, Request, TightfitError, Wishes, inspect, load, plan
from ..export import random_model
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
        rows = capped(str(model), args.device, replace(request, num_inference_steps=2))
        rows += speed(str(model), args.device, request)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items() if name not in ("stages", "notices")))
    print(f"GPU tests: {'passed' if tests.returncode == 0 else f'exit code {tests.returncode}'}")
    print(record("gpu_check", {"tests_exit_code": tests.returncode, "rows": rows}))


def capped(model: str, device: str, request: Request) -> list[Row]:
    """Every fp16 plan that fits under each cap: predicted and measured peak. A cap that no plan fits says so."""
    rows = []
    spec, hardware = inspect(model), Hardware.detect(device)
    precision = "fp16" if device == "cuda" else "bf16"
    for gigabytes in CAPS:
        wishes = Wishes(precision=precision, budget=int(gigabytes * 1e9))
        for one in (p for p in plan(hardware, spec, request, wishes) if p.fits):
            row: Row = {"cap": f"{gigabytes} GB", "plan": one.summary(), "predicted": one.predicted.peak_bytes}
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


def speed(model: str, device: str, request: Request) -> list[Row]:
    """Seconds of a warm run, ours and diffusers', taken in turns in this process; the best of three each."""
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    theirs: Any = DiffusionPipeline.from_pretrained(model, dtype=dtype).to(device)
    theirs.scheduler = EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    with load(model, device=device, residency="resident") as pipe:
        runs = {
            "tightfit": lambda: pipe.generate(request),
            "diffusers": lambda: theirs(request.prompt, num_inference_steps=request.num_inference_steps),
        }
        best = dict.fromkeys(runs, float("inf"))
        for _ in range(4):  # the first warms up; a minimum forgets it
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - start)
    ratio = best["tightfit"] / best["diffusers"]
    return [{"tightfit": f"{best['tightfit']:.3f} s", "diffusers": f"{best['diffusers']:.3f} s", "ratio": round(ratio, 3)}]


if __name__ == "__main__":
    main()
