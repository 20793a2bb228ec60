"""Everything only a GPU can tell, in one command of under nine minutes:

    pip install --no-deps --no-build-isolation -e . && python -m tightfit.benchmarks.gpu_check

It runs the GPU tests; measures every plan's peak in a full-size random SD 1.5, with the allocator capped at 2, 4, 6 and
8 GB; and times our plans beside diffusers' own pipeline in the same process. Writes gpu_check.jsonl under $OUT, else in
benchmarks/results. `--tiny --device cpu` rehearses it without a GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .. import Request, TightfitError, load
from ..export import random_model
from ..runtime.memory import shown
from ..runtime.plan import RESIDENCIES
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
        rows = capped(str(model), args.device, request)
        rows += speed(str(model), args.device, request)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    print(f"GPU tests: {'passed' if tests.returncode == 0 else f'exit code {tests.returncode}'}")
    print(record("gpu_check", {"tests_exit_code": tests.returncode, "rows": rows}))


def capped(model: str, device: str, request: Request) -> list[Row]:
    """Each residency under each cap: the peak, or that it ran out of memory."""
    rows = []
    for gigabytes in CAPS:
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / torch.cuda.mem_get_info()[1]))
        for residency in RESIDENCIES[1:]:
            row: Row = {"cap": f"{gigabytes} GB", "residency": residency}
            try:
                with load(model, device=device, residency=residency) as pipe:
                    result = pipe.generate(request)
                rows.append(row | {"weights": shown(pipe.plan.weight_bytes), "peak": shown(result.peak_bytes)})
            except TightfitError as error:
                rows.append(row | {"failed": str(error)})
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
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
