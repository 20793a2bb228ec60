"""Peak memory and time of one picture, ours beside diffusers', each in a process of its own.

    python -m tightfit.benchmarks.memory MODEL --precision bf16 --size 512 --steps 2

MODEL is a diffusers folder; `python -m tightfit.export.random_model sd1 DIR` makes a full-size one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

CONTENDERS = ("diffusers", "tightfit")


def diffusers_run(args: argparse.Namespace) -> None:
    """diffusers as its documentation starts: load, to the device, call."""
    import torch
    from diffusers import DiffusionPipeline

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    pipe: Any = DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype)
    pipe("a red heart", num_inference_steps=args.steps, width=args.size, height=args.size)


def tightfit_run(args: argparse.Namespace) -> None:
    from .. import load

    with load(args.model, precision=args.precision, residency="staged") as pipe:
        pipe("a red heart", num_inference_steps=args.steps, width=args.size, height=args.size, seed=0)


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("model")
    parse.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    parse.add_argument("--size", type=int, default=512)
    parse.add_argument("--steps", type=int, default=2)
    parse.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parse.parse_args()
    if args.only:
        import time

        from ..runtime.memory import ProcessPeak

        peak, start = ProcessPeak(), time.perf_counter()
        {"diffusers": diffusers_run, "tightfit": tightfit_run}[args.only](args)
        print(json.dumps({"peak_bytes": peak.bytes(), "seconds": time.perf_counter() - start}))
        return

    from ..runtime.memory import shown
    from .record import record

    results = {}
    for name in CONTENDERS:
        command = [sys.executable, "-m", "tightfit.benchmarks.memory", *sys.argv[1:], "--only", name]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[name] = json.loads(out.splitlines()[-1])
        print(f"{name:<10} peak {shown(results[name]['peak_bytes'])}, {results[name]['seconds']:.1f} s", flush=True)
    ratio = results["tightfit"]["peak_bytes"] / results["diffusers"]["peak_bytes"]
    print(f"tightfit's peak is {ratio:.2f} of diffusers'")
    record("memory", results | {"model": args.model, "precision": args.precision, "size": args.size, "steps": args.steps})


if __name__ == "__main__":
    main()
