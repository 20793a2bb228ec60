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
import torch
from PIL import Image

from .. import inspect, load
from .metrics import psnr
from .record import record

SCHEDULERS = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


def reference(pipeline: Any, scheduler: str, prompt: str, seed: int, **options: Any) -> Image.Image:
    """The picture of diffusers' own `pipeline` with one of SCHEDULERS, as its documentation swaps them."""
    kind, changes = SCHEDULERS[scheduler]
    before = pipeline.scheduler
    pipeline.scheduler = getattr(diffusers, kind).from_config(before.config, **changes)
    try:
        return pipeline(prompt, generator=torch.Generator("cpu").manual_seed(seed), **options).images[0]
    finally:
        pipeline.scheduler = before


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("folders", nargs="+", type=Path)
    parse.add_argument("--steps", type=int, default=8)
    args = parse.parse_args()
    options = {"num_inference_steps": args.steps, "guidance_scale": 6.0}
    table: dict[str, dict[str, float]] = {}
    for folder in args.folders:
        theirs: Any = diffusers.DiffusionPipeline.from_pretrained(inspect(str(folder)).folder, dtype=torch.float32)
        theirs.set_progress_bar_config(disable=True)
        with load(str(folder), precision="fp32", device="cpu") as pipe:
            table[folder.name] = {
                name: psnr(
                    reference(theirs, name, "a red heart", 7, **options), pipe("a red heart", seed=7, scheduler=name, **options)
                )
                for name in SCHEDULERS
            }
    print(f"{'dB':<10}", *(f"{name:>16}" for name in SCHEDULERS))
    for model, row in table.items():
        print(f"{model:<10}", *(f"{shown(value):>16}" for value in row.values()))
    record("parity", {model: {name: shown(value) for name, value in row.items()} for model, row in table.items()})


def shown(decibels: float) -> str:
    return "identical" if math.isinf(decibels) else f"{decibels:.1f}"


if __name__ == "__main__":
    main()
