"""PSNR of our fp32 pictures against diffusers' own pipelines: same weights, prompt, seed and scheduler.

    python -m tightfit.benchmarks.parity FOLDER…
    python -m tightfit.benchmarks.parity --cases > docs/parity.md
    python -m tightfit.benchmarks.parity --pictures >> docs/parity.md

Each FOLDER is a diffusers folder, painted by six schedulers; `python -m tightfit.export.random_model sdxl DIR
--tiny` makes a small one. `--cases` makes tiny models of every kind in parity_cases.py and prints a page,
`--pictures` the chapter of those in parity_pictures.py.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from .. import Pipeline, inspect, load
from ..export import random_model
from . import parity_pictures
from .metrics import psnr
from .parity_cases import AS_DIFFUSERS, PROMPT, SCHEDULERS, SEED, Case, cases
from .parity_pictures import SAMPLERS, STEPS
from .record import command, envelope, record


def reference(pipeline: Any, scheduler: str, prompt: str, seed: int, **options: Any) -> Image.Image:
    """diffusers' own picture by one of SCHEDULERS, swapped as its documentation does."""
    kind, changes = SCHEDULERS[scheduler]
    before = pipeline.scheduler
    pipeline.scheduler = getattr(diffusers, kind).from_config(before.config, **changes)
    try:
        return pipeline(prompt, generator=torch.Generator("cpu").manual_seed(seed), **options).images[0]
    finally:
        pipeline.scheduler = before


class FlowMatching(diffusers.FlowMatchEulerDiscreteScheduler):
    """With the two members that diffusers' SD and SDXL pipelines expect; they do nothing."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Any, timestep: Any) -> Any:  # noqa: ARG002
        return sample


def made(config: Mapping[str, Any]) -> Any:
    """The diffusers scheduler that a config describes."""
    name = config["_class_name"]
    kind: Any = FlowMatching if name == "FlowMatchEulerDiscreteScheduler" else getattr(diffusers, name)
    return kind.from_config(dict(config))


def with_scheduler(pipeline: Any, config: Mapping[str, Any]) -> Any:
    """A new diffusers pipeline from the same components, because its constructor corrects the scheduler's
    config."""
    again = type(pipeline)(**{**pipeline.components, "scheduler": made(config)})
    again.set_progress_bar_config(disable=True)
    return again


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("folders", nargs="*", type=Path)
    parse.add_argument("--steps", type=int, default=8)
    parse.add_argument(
        "--cases", action="store_true", help="every kind of model and scheduler instead of folders"
    )
    parse.add_argument(
        "--pictures",
        action="store_true",
        help="pictures in and two passes instead: the page's second chapter",
    )
    args = parse.parse_args()
    if bool(args.folders) + args.cases + args.pictures != 1:
        parse.error("name folders, or --cases or --pictures")
    if args.cases:
        of_cases()
    elif args.pictures:
        of_pictures()
    else:
        of_folders(args.folders, args.steps)


def of_folders(folders: list[Path], steps: int) -> None:
    options = {"num_inference_steps": steps, "guidance_scale": 6.0}
    table: dict[str, dict[str, float]] = {}
    for folder in folders:
        pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(
            inspect(str(folder)).folder, dtype=torch.float32
        )
        pipeline.set_progress_bar_config(disable=True)
        with load(str(folder), precision="fp32", device="cpu") as pipe:
            table[folder.name] = {
                name: psnr(
                    reference(pipeline, name, PROMPT, SEED, **options),
                    pipe(PROMPT, seed=SEED, scheduler=name, **options),
                )
                for name in SCHEDULERS
            }
    print(f"{'dB':<10}", *(f"{name:>16}" for name in SCHEDULERS))
    for model, row in table.items():
        print(f"{model:<10}", *(f"{shown(value):>16}" for value in row.values()))
    record(
        "parity", {model: {name: shown(value) for name, value in row.items()} for model, row in table.items()}
    )


def of_cases() -> None:
    """A page with a table of every case, and one line of results."""
    setup, rows = envelope(command()), list[dict[str, str]]()
    print("# Pictures beside diffusers' own\n")
    print(
        "Decibels of PSNR in 8 bits between our picture in fp32 and that of diffusers' own pipeline: "
        "the same tiny model with"
    )
    print(
        f"random weights, the prompt {PROMPT!r}, the seed {SEED}, four steps unless it says otherwise. "
        "Of 64x64 pixels 89 dB"
    )
    print("is one value of one channel that is off by one.\n")
    print(made_by(setup))
    with Pairs() as pairs:
        for kind, group in groupby(cases(), key=lambda case: case.kind):
            print(
                f"\n## {kind[0].upper()}{kind[1:]}\n\n"
                "| case | model | diffusers' scheduler | dB |\n|---|---|---|---|"
            )
            for case in group:
                decibels = f"needs {case.lacks}" if case.lacks else shown(pairs.decibels(case))
                print(f"| {case.name} | {case.family} | {described(case)} | {decibels} |", flush=True)
                rows.append({"kind": kind, "case": case.name, "model": case.family, "dB": decibels})
    same = sum(row["dB"] == "identical" for row in rows)
    print(f"\n{same} of {len(rows)} are identical.")
    record("parity_cases", rows, setup)


def of_pictures() -> None:
    """A chapter with a table for each kind of picture in, and one line of results."""
    setup = envelope(command())
    print(PICTURES_IN)
    print(f"\n{made_by(setup)}")
    rows, lowest = list[dict[str, str]](), math.inf
    with parity_pictures.Models() as models:
        for kind, group in groupby(parity_pictures.cases(), key=lambda case: case.kind):
            head = ["asked", "model", *SAMPLERS, "without it"]
            print(f"\n### {kind[0].upper()}{kind[1:]}\n\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
            for case in group:
                pairs = [parity_pictures.decibels(models, case, sampler) for sampler in SAMPLERS]
                values, plain = [value for value, _ in pairs], [other for _, other in pairs if other]
                cells = [*map(shown, values), shown(max(plain)) if plain else ""]
                print(f"| {case.name} | {case.family} | {' | '.join(cells)} |", flush=True)
                facts = {"kind": kind, "model": case.family}
                rows += [
                    {**facts, "case": f"{case.name}, {sampler}".removeprefix(", "), "dB": shown(value)}
                    for sampler, value in zip(SAMPLERS, values, strict=True)
                ]
                lowest = min(lowest, *values)
    same = sum(row["dB"] == "identical" for row in rows)
    print(f"\n{same} of {len(rows)} are identical, the others at least {lowest:.1f} dB.")
    record("parity_pictures", rows, setup)


PICTURES_IN = f"""
## Pictures in, and two passes

The same of diffusers' pipelines that begin with a picture, follow one or go on from one, by sampler:
{STEPS} steps, guidance 5. Inpainting is compared under the mask alone, as outside it our pixels are the
original's. *Without it* is the nearest that our picture without what is asked comes to diffusers' with it."""


def made_by(setup: Mapping[str, Any]) -> str:
    """By which command, where and with what a table is made, on two lines."""
    facts, versions = setup["hardware"], setup["versions"]
    threads = f"{facts['threads']} thread{'s' * (facts['threads'] > 1)}"
    return (
        f"Made by `{setup['command']}` on {facts['name']} ({facts['device']}, {threads}),\n"
        f"{setup['date']}: {', '.join(f'{name} {version}' for name, version in versions.items())}."
    )


class Pairs(ExitStack):
    """Tiny models in a temporary folder, each loaded once by diffusers and once by us."""

    def __init__(self) -> None:
        super().__init__()
        self._work = Path(self.enter_context(tempfile.TemporaryDirectory()))
        self._loaded: dict[str, tuple[Any, Pipeline]] = {}

    def decibels(self, case: Case) -> float:
        """PSNR between the two pictures of a case."""
        key = json.dumps([case.family, case.pipeline, case.changes])
        if key not in self._loaded:
            folder = self._work / str(len(self._loaded))
            write(case, folder)
            pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
            ours = self.enter_context(
                load(str(folder), precision="fp32", device="cpu", residency="resident", **AS_DIFFUSERS)
            )
            self._loaded[key] = pipeline, ours
        pipeline, ours = self._loaded[key]
        ours.spec = replace(ours.spec, scheduler=dict(case.own))
        generator = torch.Generator("cpu").manual_seed(SEED)
        image = with_scheduler(pipeline, case.theirs)(PROMPT, generator=generator, **case.options).images[0]
        return psnr(ours(PROMPT, seed=SEED, scheduler=case.asked, **case.options), image)


def write(case: Case, folder: Path) -> None:
    """Write a case's model as a diffusers folder. A U-Net whose layers differ from the tiny ones' gets new
    random weights."""
    random_model.write(case.family, folder, tiny=True, precision="fp32")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(case.own))
    for component, fields in case.changes.items():
        file = folder / component / "config.json"
        config = json.loads(file.read_text("utf-8")) | fields
        file.write_text(json.dumps(config))
        if "time_cond_proj_dim" in fields:
            torch.manual_seed(0)
            unet: Any = diffusers.UNet2DConditionModel.from_config(config)
            unet.save_pretrained(folder / component)
    index = folder / "model_index.json"
    facts = json.loads(index.read_text("utf-8")) | {"scheduler": ["diffusers", case.own["_class_name"]]}
    index.write_text(json.dumps(facts | ({"_class_name": case.pipeline} if case.pipeline else {})))


def described(case: Case) -> str:
    """diffusers' scheduler: its class, its options other than the usual betas, and what else is asked for."""
    kind = case.theirs["_class_name"].removesuffix("Scheduler")
    usual = {"_class_name", "beta_start", "beta_end", "beta_schedule"}
    options = [f"{name} {value}" for name, value in case.theirs.items() if name not in usual]
    return ", ".join([kind, *options, *([f"asked for as {case.asked}"] if case.asked else [])])


def shown(decibels: float) -> str:
    return "identical" if math.isinf(decibels) else f"{decibels:.1f}"


if __name__ == "__main__":
    main()
