"""How far each precision's pictures are from fp32's of the same seed: the figures that a plan prints as dB.

    python -m tightfit.benchmarks.quality

PSNR of 24 of emoji's pictures with each precision; the worst is what runtime/planner.py promises. Strips and attentions are
held by tests instead: they change nothing that fp32 shows.
"""

from __future__ import annotations

import argparse
import statistics

from .. import Request, load
from .parity import psnr
from .record import record

PROMPTS = ("a red heart", "pizza", "cat", "rocket", "umbrella", "rose", "train", "grinning face")
SEEDS = (1, 2, 3)


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--model", default="emoji")
    parse.add_argument("--steps", type=int, default=20)
    args = parse.parse_args()
    pictures = {}
    for precision in ("fp32", "bf16", "fp16"):
        with load(args.model, precision=precision, device="cpu") as pipe:
            requests = [Request(prompt, seed=seed, num_inference_steps=args.steps) for prompt in PROMPTS for seed in SEEDS]
            pictures[precision] = [pipe.generate(request).images[0] for request in requests]
    results = {}
    for precision in ("bf16", "fp16"):
        decibels = sorted(psnr(ours, exact) for ours, exact in zip(pictures[precision], pictures["fp32"], strict=True))
        results[precision] = {"worst": round(decibels[0], 1), "median": round(statistics.median(decibels), 1)}
        print(precision, results[precision])
    record("quality", results | {"pictures": len(pictures["fp32"]), "model": args.model})


if __name__ == "__main__":
    main()
