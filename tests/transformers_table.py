"""Families whose denoiser is a transformer: our pictures beside those of diffusers' own pipelines, and
predicted peaks beside measured ones.

    python tests/transformers_table.py [FAMILY…]

Models are tiny and random (`python -m tightfit.export.random_model FAMILY DIR --tiny`), and both are handed
the same noise.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import tightfit
import torch
from tightfit.benchmarks.record import envelope
from tightfit.export import random_model
from tightfit.runtime.cli.output import say
from tightfit.runtime.conditions.input_pictures import open_picture
from tightfit.runtime.conditions.reference import References
from tightfit.runtime.placement import RESIDENCIES
from tightfit.runtime.units import shown

FAMILIES = ("flux2-klein", "z-image", "sd3", "sd3-without-t5", "flux1-dev", "flux1-schnell")
_EDIT = tightfit.Request("make it red", width=160, height=96, seed=2)
_NOISE = np.random.default_rng(0)
_PICTURES = tuple(
    open_picture(_NOISE.integers(0, 256, (height, width, 3), np.uint8))
    for height, width in ((70, 100), (130, 64))
)
CASES = (
    ("as it is", tightfit.Request("a red heart", width=64, height=96, seed=5)),
    ("a text that is cut", tightfit.Request("a cat 心 " * 100, width=128, height=64, seed=7)),
    ("no text", tightfit.Request("", width=64, height=64, seed=1)),
    ("one step", tightfit.Request("a dog", width=160, height=96, seed=2, num_inference_steps=1)),
    ("guided", tightfit.Request("a dog", width=160, height=96, seed=2, guidance_scale=4.0)),
    (
        "guided away from a longer text",
        tightfit.Request(
            "a dog", negative_prompt="ugly " * 9, width=64, height=96, seed=2, guidance_scale=4.0
        ),
    ),
    ("nine steps", tightfit.Request("a dog", width=160, height=96, seed=2, num_inference_steps=9)),
    ("one reference", replace(_EDIT, conditions=(References(_PICTURES[:1]),))),
    ("two references", replace(_EDIT, conditions=(References(_PICTURES),))),
    ("256x192", tightfit.Request("a red heart", width=256, height=192, seed=3)),
)
FROM_NONE = {"z-image": 1.0}  # what diffusers calls 0
HOW = {"flux1-schnell": {"max_sequence_length": 256}}  # where diffusers has it by hand
PRECISIONS = ("fp32", "bf16", "int8", "int4", "int8-dynamic")


def by_diffusers(pipe: Any, request: tightfit.Request, spec: tightfit.ModelSpec) -> np.ndarray:
    noise = torch.Generator().manual_seed(request.seed or 0)
    steps = request.num_inference_steps or spec.default_steps
    guidance = (request.guidance_scale or spec.default_guidance) - FROM_NONE.get(spec.family, 0)
    size = {"width": request.width, "height": request.height}
    how = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"}
    how |= HOW.get(spec.family, {})
    if request.negative_prompt is not None:
        how["negative_prompt"] = request.negative_prompt
    if references := [one for one in request.conditions if isinstance(one, References)]:
        how["image"] = [picture.image for picture in references[0].pictures]
    return (pipe(prompt=request.prompt, generator=noise, **size, **how).images[0] * 255).round()


def _is_idle(request: tightfit.Request, spec: tightfit.ModelSpec) -> bool:
    """Whether it asks for what the model does not do, as one that was distilled for its guidance."""
    if request.conditions and not spec.design.reference_pixels:
        return True
    if request.negative_prompt and spec.is_distilled:
        return True
    return bool(request.guidance_scale) and spec.takes_no_guidance


def pictures(family: str, folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    left_out = dict.fromkeys(name for name, value in index.items() if value == [None, None])
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **left_out)
    pipe.set_progress_bar_config(disable=True)
    spec = tightfit.inspect(folder)
    cases = [(name, one) for name, one in CASES if not _is_idle(one, spec)]
    cells = {name: [] for name, _ in cases}
    for residency in RESIDENCIES:
        with tightfit.load(str(folder), precision="fp32", device="cpu", residency=residency) as ours:
            for name, request in cases:
                picture = np.asarray(ours.generate(request).images[0], float)
                error = np.square(picture - by_diffusers(pipe, request, spec)).mean()
                cells[name].append("identical" if not error else f"{10 * math.log10(255**2 / error):.1f}")
    for name, request in cases:
        say(f"| {family} | {name} | {request.width}x{request.height} | {' | '.join(cells[name])} |")


def peaks(family: str, model: Path, precision: str, residency: str) -> str:
    """Predicted bytes of each stage, and by how many per cent they are off."""
    wishes = {"precision": precision, "residency": residency, "device": "cpu"}
    request, cells = CASES[-1][1], []
    for tiling in ("whole", "tiled"):
        with tightfit.load(str(model), **wishes, tiling=tiling) as ours:
            # What stays is loaded in the first run, in which it takes the most to load, or is there in the
            # second.
            results = [ours.generate(request) for _ in range(1 + (residency == "resident"))]
        for stage, predicted in results[0].plan.predicted.stages.items():
            if tiling == "whole" or stage == "decode":
                measured = max(result.stages[stage].peak_bytes for result in results)
                off = round(100 * (predicted / measured - 1), 1) + 0
                cells.append(f"{shown(predicted)}, {off:+.1f}")
    return f"| {family} | {precision} | {residency} | {' | '.join(cells)} |"


def main() -> None:
    families = sys.argv[1:] or FAMILIES
    diffusers.utils.logging.set_verbosity_error()
    facts = envelope("")
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    say(f"Made by `{' '.join(['python tests/transformers_table.py', *sys.argv[1:]])}`,")
    say(f"{facts['date']}, {facts['hardware']['name']}: {versions}.")
    say("")
    with tempfile.TemporaryDirectory() as made:
        folders = {family: Path(made) / family for family in families}
        for family, folder in folders.items():
            random_model.write(family, folder, tiny=True, precision="fp32")
        say(f"| family | case | size | {' | '.join(RESIDENCIES)} |")
        say("|---|---|---|---|---|---|")
        for family, folder in folders.items():
            pictures(family, folder)
        say("")
        say("| family | precision | residency | encode | denoise | decode | in strips |")
        say("|---|---|---|---|---|---|---|")
        for family, folder in folders.items():
            for precision in PRECISIONS:
                exported = folder
                if precision in ("int8", "int4"):
                    exported = tightfit.export_model(folder, Path(made) / f"{family}-{precision}", precision)
                for residency in RESIDENCIES if precision != "int8-dynamic" else RESIDENCIES[:2]:
                    say(peaks(family, exported, precision, residency))


if __name__ == "__main__":
    main()
