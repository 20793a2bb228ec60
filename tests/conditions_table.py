"""Pictures in, predicted beside measured: every kind of condition with precisions, residencies and tilings;
and random ones of them within random budgets.

    (python tests/conditions_table.py; python tests/conditions_table.py --random 300) > docs/conditions.md

Models are tiny and random.
"""

from __future__ import annotations

import argparse
import math
import random
import runpy
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tightfit
from PIL import Image
from tightfit.benchmarks import random_parts
from tightfit.benchmarks.record import envelope
from tightfit.export import random_model
from tightfit.runtime import adapters, conditions
from tightfit.runtime.cli.output import say
from tightfit.runtime.passes import passes
from tightfit.runtime.pipeline import MANY
from tightfit.runtime.units import shown

# Half as deep as `--tiny`, as what takes the time is the number of operators.
SHALLOW = runpy.run_path(str(Path(__file__).with_name("conftest.py")))["shallow"]
PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)).resize((96, 128), 3)
MASK = Image.new("L", PICTURE.size)
MASK.paste(255, (16, 40, 64, 90))
FAMILIES, REFINER = ("sd1", "sdxl"), "sdxl-refiner"
UPSCALER = "4x.safetensors"
PRECISIONS = ("fp32", "bf16", "int8", "int4")
RESIDENCIES = ("staged", "resident", "streamed")
TILINGS = ("whole", "tiled")
SLACK_BYTES = 2**16  # of a stage that takes next to nothing
PROMISED = 5  # per cent
Models = Mapping[str, tightfit.ModelSpec]
"""The same objects for all, so that what a size takes is followed once."""


def models(root: Path) -> Models:
    """By family, and by family and channels; and beside them what reads pictures."""
    made = {}
    for family in (*FAMILIES, REFINER):
        deep = made[f"{family}-deep"] = root / f"{family}-deep"
        random_model.write(family, deep, tiny=True, precision="fp32")
    for family in (*FAMILIES, REFINER):
        made[family] = root / family
        random_model.TINY[family] = SHALLOW(family, {"layers_per_block": 1})
        random_model.write(family, made[family], tiny=True, precision="fp32")
    for family in FAMILIES:
        for number in (0, 1):
            random_parts.controlnet(made[family], number, root / f"{family}-control-{number}")
        random_parts.t2i_adapter(made[f"{family}-deep"], root / f"{family}-t2i")
        random_parts.lora(made[family], lora(root, family))
        for plus in (False, True):
            random_parts.ip_adapter(made[family], plus, root / f"{family}-ip-{plus}")
        for channels in (8, 9):
            name = f"{family}-{channels}"
            made[name] = random_parts.wider(made[family], channels, root / name)
    random_parts.upscaler(root / UPSCALER)
    return {name: tightfit.inspect(str(folder)) for name, folder in made.items()}


def kinds(root: Path, family: str) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """What is asked, and of which model."""
    nets = [str(root / f"{family}-control-{number}") for number in (0, 1)]
    one = {"controlnet": nets[:1], "control_image": [PICTURE]}
    two = {"controlnet": nets, "control_image": [PICTURE, PICTURE]}
    shown_picture = {"image": PICTURE, "strength": 0.6}
    prompts = {
        plus: {"ip_adapter_image": PICTURE, "ip_adapter": root / f"{family}-ip-{plus}/ip.safetensors"}
        for plus in (False, True)
    }
    larger = {"hires": 1.5, "hires_strength": 0.5}
    asked = {
        "image": (family, shown_picture),
        "inpainting": (family, {"image": PICTURE, "mask_image": MASK}),
        "inpainting, 9 channels": (f"{family}-9", {"image": PICTURE, "mask_image": MASK}),
        "outpainting": (family, {"image": PICTURE, "outpaint": "left=32"}),
        "editing, 8 channels": (f"{family}-8", {"image": PICTURE}),
        "a ControlNet": (family, one),
        "two ControlNets": (family, two),
        "image, a ControlNet": (family, shown_picture | one),
        "image, a ControlNet, a LoRA": (family, shown_picture | one | {"lora": lora(root, family)}),
        "a T2I-Adapter": (f"{family}-deep", one | {"controlnet": [str(root / f"{family}-t2i")]}),
        "an IP-Adapter": (family, prompts[False]),
        "an IP-Adapter plus": (family, prompts[True]),
        "hires fix, latent": (family, larger),
        "hires fix, lanczos": (family, larger | {"hires_upscaler": "lanczos"}),
        "hires fix, an upscaler's file": (family, larger | {"hires_upscaler": str(root / UPSCALER)}),
        "hires fix, a ControlNet": (family, larger | one),
    }
    if family == "sdxl":
        asked["a refiner"] = (family, {"refiner": str(root / REFINER), "refiner_start": 0.5})
    return asked


def lora(root: Path, family: str) -> Path:
    return root / f"{family}-lora.safetensors"


def request(asked: Mapping[str, Any], **others: Any) -> tightfit.Request:
    fields = {name: value for name, value in asked.items() if name in tightfit.Request.__dataclass_fields__}
    given = {name: [str(asked[name])] for name in ("lora", "ip_adapter") if name in asked}
    size = {} if "image" in asked else {"width": 96, "height": 128}
    wish = {"num_inference_steps": 3, "seed": 3, "scheduler": "euler", **fields, **size, **others}
    asking = {name: value for name, value in asked.items() if name in conditions.options()}
    return tightfit.Request(
        "a cat", adapters=adapters.written(given), conditions=conditions.asked(asking), **wish
    )


def combinations() -> Iterator[dict[str, str]]:
    for precision, residency, tiling in product(PRECISIONS, RESIDENCIES, TILINGS):
        if residency != "streamed" or precision in ("fp32", "bf16"):
            yield {"precision": precision, "residency": residency, "tiling": tiling}


def measured(made: Models, root: Path) -> None:
    """Every kind with every combination: the error of each stage, in per cent of the measured peak."""
    every: list[float] = []
    for family in FAMILIES:
        for kind, (model, asked) in kinds(root, family).items():
            errors = [error for wishes in combinations() for error in stages(made[model], asked, wishes)]
            worst = round(max(errors, key=abs), 1) + 0  # no -0.0
            median = statistics.median(map(abs, errors))
            cells = [kind, family, str(len([*combinations()])), f"{median:.2f}", f"{worst:+.1f}"]
            say(f"| {' | '.join(cells)} |")
            every += errors
    sizes = [abs(error) for error in every]
    say("")
    say(f"{len(every)} stages: median {statistics.median(sizes):.2f} %, worst {max(sizes):.1f} %.")


def pipeline(spec: tightfit.ModelSpec, machine: tightfit.Hardware, **wishes: Any) -> tightfit.Pipeline:
    """Of one way of attention, which leaves half to plan."""
    return tightfit.Pipeline(spec, machine, tightfit.Wishes(requests=MANY, attention="sdpa", **wishes))


def stages(spec: tightfit.ModelSpec, asked: Mapping[str, Any], wishes: Mapping[str, str]) -> Iterator[float]:
    """The error of each stage of each pass that takes more than next to nothing. What stays resident is
    loaded in a first request, and there in a second; a plan is of both."""
    with pipeline(spec, tightfit.Hardware.detect("cpu"), **wishes) as pipe:
        results = [pipe.generate(request(asked)) for _ in range(1 + (wishes["residency"] == "resident"))]
    for same in zip(*(result.passes for result in results), strict=True):
        for stage, predicted in same[0].plan.predicted.stages.items():
            truth = max(one.stages[stage].peak_bytes if stage in one.stages else 0 for one in same)
            if max(predicted, truth) > SLACK_BYTES:
                error = 100 * (predicted / truth - 1) if truth else math.inf
                if abs(error) > PROMISED:
                    say(f"{spec.name} {asked} {wishes}: {stage} {predicted} of {truth}", err=True)
                yield error


def budgeted(made: Models, root: Path, most: int, minutes: float) -> None:
    """Random kinds, sizes and precisions, half of them with a LoRA, within random budgets: none over, and
    none refused that would fit."""
    draw, said, end = random.Random(0), Counter[str](), time.monotonic() + 60 * minutes
    machine, count = tightfit.Hardware.detect("cpu"), 0
    while count < most and time.monotonic() < end:
        model, wish = drawn(draw, root)
        free = pipeline(made[model], machine, precision=draw.choice(PRECISIONS))
        least, largest = needed(free, wish)
        room = round(draw.uniform(0.8 * least, 1.2 * largest))
        outcomes = within(free, wish, room, least)
        if wrong := {"over", "refused, wrongly"} & {*outcomes}:
            say(f"{model} {wish} in {room} bytes, {least} at least, {free.wishes}: {wrong}", err=True)
        said.update(outcomes)
        count += 1
    outcome = ", ".join(f"{number} {words}" for words, number in sorted(said.items()))
    say("")
    say(f"{count} random ones within random budgets, half of them with a LoRA: {outcome}.")


def drawn(draw: random.Random, root: Path) -> tuple[str, tightfit.Request]:
    """A model, and what is asked of it."""
    family = draw.choice(FAMILIES)
    model, asked = draw.choice([*kinds(root, family).values()])
    sides = {} if "outpaint" in asked else {side: 16 * draw.randint(4, 12) for side in ("width", "height")}
    if draw.random() < 0.5 and not model.endswith("-deep"):
        asked = {**asked, "lora": lora(root, family)}
    return model, request(asked, **sides, guidance_scale=draw.choice([1.0, 5.0]))


def within(free: tightfit.Pipeline, wish: tightfit.Request, room: int, least: int) -> list[str]:
    """What becomes of a request where so many bytes are free, and so many are needed at least."""
    wishes = replace(free.wishes, budget=free.hardware.context_bytes + room)
    with tightfit.Pipeline(free.spec, free.hardware, wishes) as pipe:
        try:
            result = pipe.generate(wish)
        except tightfit.TightfitError:
            return ["refused, rightly" if least > room else "refused, wrongly"]
        outcome = "within the budget" if most_held(pipe, result) <= room else "over"
    stepped = any("out of memory" in notice for notice in result.notices)
    return [outcome, *["with a step down"] * stepped]


def most_held(pipe: tightfit.Pipeline, result: tightfit.Result) -> int:
    """Bytes at once. A refiner runs beside what stays loaded of the model before."""
    *earlier, last = (max(stage.peak_bytes for stage in one.stages.values()) for one in result.passes)
    return max(*earlier, last + pipe.loaded.held() * (result.request.refiner is not None), 0)


def needed(free: tightfit.Pipeline, wish: tightfit.Request) -> tuple[int, int]:
    """Bytes that the least and the most of all ways take, of the pass that takes the most."""
    peaks = [
        [plan.predicted.peak_bytes for plan in tightfit.plan(free.hardware, job.model, job, free.wishes)]
        for job in passes(wish.resolve(free.spec))
    ]
    return max(map(min, peaks)), max(map(max, peaks))


def lines(text: str) -> None:
    for line in text.splitlines():
        say(line)


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--random", type=int, metavar="COUNT", help="so many random ones instead of the table")
    parse.add_argument("--minutes", type=float, default=math.inf, help="to draw random ones for")
    args = parse.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        made = models(root)
        if args.random is not None:
            budgeted(made, root, args.random, args.minutes)
            return
        facts = envelope("")
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        lines(HEAD.format(machine=facts["hardware"]["name"], date=facts["date"], versions=versions))
        measured(made, root)
        say(f"The smallest stages, of less than {shown(SLACK_BYTES)}, are left out.")


HEAD = """# Pictures in: predicted beside measured

Errors of the predicted peak of each stage in per cent of the measured one, of tiny random models on a CPU:
in fp32, bf16, int8 and int4, staged, resident and streamed, the VAE whole and in strips. Of what stays
resident the peak is the larger one of two requests: the first loads it, and the second has all of it.

Made by `python tests/conditions_table.py`, and the last line by the same with `--random`, on {machine}
(CPU, one thread), {date}: {versions}.

| asked | model | combinations | median, % | worst, % |
|---|---|---|---|---|"""


if __name__ == "__main__":
    main()
