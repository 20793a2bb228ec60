"""Pictures in, predicted beside measured: every kind of condition with precisions, residencies and tilings;
and random ones of them within random budgets.

    python tests/conditions_table.py [--random 300] > docs/conditions.md

Models are tiny and random.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import tightfit
import torch
from PIL import Image
from tightfit.benchmarks.record import envelope
from tightfit.export import random_model
from tightfit.runtime import conditions
from tightfit.runtime.cli.output import say
from tightfit.runtime.units import shown

PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)).resize((96, 128), 3)
MASK = Image.new("L", PICTURE.size)
MASK.paste(255, (16, 40, 64, 90))
FAMILIES = ("sd1", "sdxl")
PRECISIONS = ("fp32", "bf16", "int8", "int4")
RESIDENCIES = ("staged", "resident", "streamed")
TILINGS = ("whole", "tiled")
SLACK_BYTES = 2**16  # of a stage that takes next to nothing


def models(root: Path) -> dict[str, Path]:
    """By family and channels, and two ControlNets of each."""
    made = {}
    for family in FAMILIES:
        folder = root / family
        random_model.write(family, folder, tiny=True, precision="fp32")
        made[family] = folder
        unet: Any = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
        for number in (0, 1):
            torch.manual_seed(number)
            net: Any = diffusers.ControlNetModel.from_unet(unet)
            net.save_pretrained(root / f"{family}-control-{number}")
        for channels in (8, 9):
            copy = made[f"{family}-{channels}"] = Path(shutil.copytree(folder, root / f"{family}-{channels}"))
            config = json.loads((copy / "unet/config.json").read_text()) | {"in_channels": channels}
            shutil.rmtree(copy / "unet")
            wider: Any = diffusers.UNet2DConditionModel.from_config(config)
            wider.save_pretrained(copy / "unet")
    return made


def kinds(root: Path, family: str) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """What is asked, and of which model."""
    nets = [str(root / f"{family}-control-{number}") for number in (0, 1)]
    one = {"controlnet": nets[:1], "control_image": [PICTURE]}
    two = {"controlnet": nets, "control_image": [PICTURE, PICTURE]}
    shown_picture = {"image": PICTURE, "strength": 0.6}
    return {
        "image": (family, shown_picture),
        "inpainting": (family, {"image": PICTURE, "mask_image": MASK}),
        "inpainting, 9 channels": (f"{family}-9", {"image": PICTURE, "mask_image": MASK}),
        "outpainting": (family, {"image": PICTURE, "outpaint": "left=32"}),
        "editing, 8 channels": (f"{family}-8", {"image": PICTURE}),
        "a ControlNet": (family, one),
        "two ControlNets": (family, two),
        "image, a ControlNet": (family, shown_picture | one),
    }


def request(asked: Mapping[str, Any], **others: Any) -> tightfit.Request:
    size = {} if "image" in asked else {"width": 96, "height": 128}
    wish = {"num_inference_steps": 3, "seed": 3, "scheduler": "euler", **size, **others}
    return tightfit.Request("a cat", conditions=conditions.asked(asked), **wish)


def combinations() -> Iterator[dict[str, str]]:
    for precision, residency, tiling in product(PRECISIONS, RESIDENCIES, TILINGS):
        if residency != "streamed" or precision in ("fp32", "bf16"):
            yield {"precision": precision, "residency": residency, "tiling": tiling}


def measured(made: Mapping[str, Path], root: Path) -> None:
    """Every kind with every combination: the error of each stage, in per cent of the measured peak."""
    every: list[float] = []
    for family in FAMILIES:
        for kind, (model, asked) in kinds(root, family).items():
            errors = []
            for wishes in combinations():
                with tightfit.load(str(made[model]), device="cpu", **wishes) as pipe:
                    for _ in range(1 + (wishes["residency"] == "resident")):  # until all is there that stays
                        result = pipe.generate(request(asked))
                stages = result.plan.predicted.stages
                for stage, predicted in stages.items():
                    truth = result.stages[stage].peak_bytes
                    if max(predicted, truth) > SLACK_BYTES:
                        errors.append(100 * (predicted / truth - 1))
            worst = max(errors, key=abs)
            every += errors
            cells = [
                kind,
                family,
                str(sum(1 for _ in combinations())),
                f"{statistics.median(map(abs, errors)):.2f}",
            ]
            say(f"| {' | '.join([*cells, f'{worst + 0:+.1f}'])} |")
    sizes = [abs(error) for error in every]
    say("")
    say(f"{len(every)} stages: median {statistics.median(sizes):.2f} %, worst {max(sizes):.1f} %.")


def budgeted(made: Mapping[str, Path], root: Path, count: int) -> None:
    """Random kinds and sizes within random budgets: none over, and none refused that would fit."""
    draw, said = random.Random(0), Counter[str]()
    machine = tightfit.Hardware.detect("cpu")
    for _ in range(count):
        family = draw.choice(FAMILIES)
        model, asked = draw.choice([*kinds(root, family).values()])
        sides = (
            {} if "outpaint" in asked else {side: 16 * draw.randint(4, 12) for side in ("width", "height")}
        )
        wish, spec = (
            request(asked, **sides, guidance_scale=draw.choice([1.0, 5.0])),
            tightfit.inspect(str(made[model])),
        )
        peaks = [plan.predicted.peak_bytes for plan in tightfit.plan(machine, spec, wish)]
        room = round(draw.uniform(0.8 * min(peaks), 1.2 * max(peaks)))
        budget = machine.context_bytes + room
        try:
            with tightfit.load(str(made[model]), device="cpu", budget=budget) as pipe:
                result = pipe.generate(wish)
        except tightfit.TightfitError:
            said["refused, rightly" if min(peaks) > room else "refused, wrongly"] += 1
            continue
        said["within the budget" if result.peak_bytes <= room else "over"] += 1
        said["with a step down"] += any("out of memory" in notice for notice in result.notices)
    outcome = ", ".join(f"{number} {words}" for words, number in sorted(said.items()))
    say("")
    say(f"{count} random ones within random budgets: {outcome}.")


def lines(text: str) -> None:
    for line in text.splitlines():
        say(line)


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--random", type=int, default=300)
    args = parse.parse_args()
    facts = envelope("")
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines(HEAD.format(machine=facts["hardware"]["name"], date=facts["date"], versions=versions))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        made = models(root)
        measured(made, root)
        budgeted(made, root, args.random)
    say("")
    say(f"The smallest stages, of less than {shown(SLACK_BYTES)}, are left out.")


HEAD = """# Pictures in: predicted beside measured

Errors of the predicted peak of each stage in per cent of the measured one, of tiny random models on a CPU:
in fp32, bf16, int8 and int4, staged, resident and streamed, the VAE whole and in strips.

Made by `python tests/conditions_table.py > docs/conditions.md` on {machine} (CPU, one thread),
{date}: {versions}.

| asked | model | combinations | median, % | worst, % |
|---|---|---|---|---|"""


if __name__ == "__main__":
    main()
