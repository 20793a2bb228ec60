"""Similarity to fp32 pictures of the same seed: the dB that a plan prints, and the quality of every
quantisation.

    python -m tightfit.benchmarks.quality                               # 24 pictures of each precision
    python -m tightfit.benchmarks.quality --work WORK emoji:int8:fp32 emoji:int4:fp32 DIR:int4:fp32

A contender is MODEL:PRECISION:COMPUTE. With WORK, the folder of emoji's training, 200 of its labels are
painted, one seed each, and the pictures nearest to their own label are counted. Strips and attentions are
covered by tests instead: they change nothing that shows in fp32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import Request, load
from .metrics import summary
from .record import named, record

PROMPTS = ("a red heart", "pizza", "cat", "rocket", "umbrella", "rose", "train", "grinning face")
SEEDS = (1, 2, 3)
CONTENDERS = ("emoji:bf16:bf16", "emoji:fp16:fp16", "emoji:int8:fp32", "emoji:int4:fp32")


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("contenders", nargs="*", default=CONTENDERS, metavar="MODEL:PRECISION:COMPUTE")
    parse.add_argument("--reference", default="emoji:fp32:fp32")
    parse.add_argument("--work", type=Path)
    parse.add_argument("--labels", type=int, default=200)
    parse.add_argument("--steps", type=int, default=20)
    args = parse.parse_args()
    jobs, judge = [(prompt, seed) for prompt in PROMPTS for seed in SEEDS], None
    if args.work:
        jobs, judge = labelled(args.work, args.labels)
    requests = [Request(prompt, seed=seed, num_inference_steps=args.steps) for prompt, seed in jobs]
    exact, rows = paint(args.reference, requests), []
    for contender in (args.reference, *args.contenders):
        pictures = exact if contender == args.reference else paint(contender, requests)
        row: dict[str, Any] = {"contender": named(contender), **summary(pictures, exact)}
        row |= {"match": judge(pictures)} if judge else {}
        print(row, flush=True)
        rows.append(row)
    record("quality", {"pictures": len(requests), "steps": args.steps, "rows": rows})


def paint(contender: str, requests: Sequence[Request]) -> list[Any]:
    """Pictures by MODEL:PRECISION:COMPUTE."""
    model, precision, compute = contender.rsplit(":", 2)
    with load(model, precision=precision, compute=compute, device="cpu") as pipe:
        return [pipe.generate(request).images[0] for request in requests]


def labelled(work: Path, count: int) -> tuple[list[tuple[str, int]], Callable[[Sequence[Any]], float]]:
    """`count` labels of emoji's training with a seed each, and a function: the share of pictures nearest to
    their own label."""
    from ..export.emoji import data
    from ..export.emoji.diffusion import match

    data.fetch(work)
    chosen = data.emoji(work)
    pictures = torch.from_numpy(data.pixels(chosen, 128)).permute(0, 3, 1, 2)
    right = np.linspace(0, len(chosen) - 1, count).round().astype(int).tolist()

    def judge(drawn: Sequence[Any]) -> float:
        return match(
            torch.from_numpy(np.stack([np.array(picture) for picture in drawn])).permute(0, 3, 1, 2),
            pictures,
            right,
        )[0]

    return [(chosen[i].label, i) for i in right], judge


if __name__ == "__main__":
    main()
