"""Peak memory and time of one picture, ours against diffusers', each in its own process.

    python -m tightfit.benchmarks.memory MODEL --precision bf16 --size 512 --steps 2

MODEL is a diffusers folder; `python -m tightfit.export.random_model sd1 DIR` makes a full-size one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from ..runtime.machine.process import ProcessPeak
from ..runtime.models.hub import inspect
from ..runtime.units import shown
from .record import named, record


def diffusers_run(args: argparse.Namespace) -> int:
    """diffusers as its documentation starts: load, then call, with Euler as in ours. Returns the process's
    peak resident bytes."""
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    from ..runtime.backends.torch.loading import DTYPES

    folder = inspect(args.model).folder  # refuses a model that names its own classes
    peak = ProcessPeak()
    pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=DTYPES[args.precision], safety_checker=None)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe("a red heart", num_inference_steps=args.steps, width=args.size, height=args.size)
    return peak.bytes()


def tightfit_run(args: argparse.Namespace) -> int:
    """Ours as the command line runs it. Returns the peak over all stages and the time before them."""
    from .. import Request, load

    before = ProcessPeak()
    wishes: dict[str, Any] = {"budget": args.ram} if args.ram else {"residency": "staged"}
    with load(args.model, precision=args.precision, device="cpu", requests=1, **wishes) as pipe:
        loaded = before.bytes()
        options = {"num_inference_steps": args.steps, "width": args.size, "height": args.size}
        request = Request("a red heart", seed=0, scheduler="euler", **options)
        result = pipe.generate(request)
    for name, stage in result.stages.items():
        print(f"  {name} {shown(stage.process_bytes)}, {stage.seconds:.1f} s", file=sys.stderr)
    print(f"  {result.plan.summary()}", file=sys.stderr)
    return max(loaded, result.process_bytes)


CONTENDERS = {"diffusers": diffusers_run, "tightfit": tightfit_run}


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("model")
    parse.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    parse.add_argument("--size", type=int, default=512)
    parse.add_argument("--steps", type=int, default=2)
    parse.add_argument("--ram", help="a budget for ours, such as 1.5GiB")
    parse.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parse.parse_args()
    if args.only:
        start = time.perf_counter()
        print(
            json.dumps(
                {"peak_bytes": CONTENDERS[args.only](args), "seconds": round(time.perf_counter() - start, 1)}
            )
        )
        return
    results = {}
    for name in CONTENDERS:
        command = [sys.executable, "-m", "tightfit.benchmarks.memory", *sys.argv[1:], "--only", name]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[name] = json.loads(out.splitlines()[-1])
        print(
            f"{name:<10} peak {shown(results[name]['peak_bytes'])}, {results[name]['seconds']:.1f} s",
            flush=True,
        )
    ratio = results["tightfit"]["peak_bytes"] / results["diffusers"]["peak_bytes"]
    print(f"tightfit's peak is {ratio:.2f} of diffusers'")
    record(
        "memory",
        results
        | {"model": named(args.model), "precision": args.precision}
        | {"size": args.size, "steps": args.steps, "ram": args.ram},
    )


if __name__ == "__main__":
    main()
