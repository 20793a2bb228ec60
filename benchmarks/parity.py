"""PSNR of our fp32 pictures against diffusers' own pipelines: same weights, prompt, seed and scheduler.

    python -m tightfit.benchmarks.parity FOLDER…

Each FOLDER is a diffusers folder; `python -m tightfit.export.random_model sdxl DIR --tiny` makes a small one.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from .. import load
from .record import record

SCHEDULERS = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


def psnr(a, b) -> float:
    """Decibels between two pictures of 8 bits; infinite if they are the same."""
    error = np.square(np.asarray(a, float) - np.asarray(b, float)).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("folders", nargs="+", type=Path)
    parse.add_argument("--steps", type=int, default=8)
    args = parse.parse_args()
    table: dict[str, dict[str, float]] = {}
    for folder in args.folders:
        theirs: Any = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        theirs.set_progress_bar_config(disable=True)
        own, row = theirs.scheduler.config, {}
        with load(str(folder), precision="fp32", device="cpu") as pipe:
            for name, (kind, changes) in SCHEDULERS.items():
                theirs.scheduler = getattr(diffusers, kind).from_config(own, **changes)
                options = {"num_inference_steps": args.steps, "guidance_scale": 6.0}
                reference = theirs("a red heart", generator=torch.Generator().manual_seed(7), **options).images[0]
                row[name] = psnr(reference, pipe("a red heart", seed=7, scheduler=name, **options))
        table[folder.name] = row
    print(f"{'dB':<10}", *(f"{name:>16}" for name in SCHEDULERS))
    for model, row in table.items():
        print(f"{model:<10}", *(f"{'identical' if math.isinf(v) else f'{v:.1f}':>16}" for v in row.values()))
    record("parity", {m: {n: "identical" if math.isinf(v) else round(v, 2) for n, v in row.items()} for m, row in table.items()})


if __name__ == "__main__":
    main()
