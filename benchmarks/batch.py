"""A table of pictures by `tightfit batch`, beside the same one by one in Python, and beside diffusers.

    python -m tightfit.benchmarks.batch --pictures 300
    python -m tightfit.benchmarks.batch --model sd15 --pictures 6 --steps 4 --sizes 512x512 --ways batch alone

Each way runs in a process of its own, with the same prompts, seeds, sizes and scheduler. Its seconds begin
once libraries and weights are loaded; `process_bytes` is the most memory that it held. diffusers gets the
pictures of a size in batches of `--per-call`, with a generator each, as its documentation says. `db`: PSNR of
each way's pictures against those made `alone`, the worst of all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from .record import named, record
from .suite import PROMPTS

if TYPE_CHECKING:
    from ..runtime.batch.ledger import Item
    from ..runtime.batch.painting import Encoded, Made

GUIDANCE = 3.0
SCHEDULER = "euler"


@dataclass(frozen=True)
class Work:
    """What is painted: rows of a table."""

    model: str
    rows: Sequence[dict[str, Any]]
    per_call: int
    precision: str

    @property
    def common(self) -> dict[str, Any]:
        return {
            "guidance_scale": GUIDANCE,
            "scheduler": SCHEDULER,
            "num_inference_steps": self.rows[0]["steps"],
        }


def rows(pictures: int, sizes: Sequence[tuple[int, int]], steps: int) -> list[dict[str, Any]]:
    """Mixed sizes and prompts, a seed each."""
    return [
        {"prompt": PROMPTS[n % len(PROMPTS)], "seed": n, "width": width, "height": height, "steps": steps}
        for n in range(pictures)
        for width, height in [sizes[n * 7 % len(sizes)]]
    ]


class BySeed:
    """Where pictures go; no seed is there twice."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def encoded(self, made: Made) -> Encoded:
        from ..runtime.batch.painting import Encoding

        return Encoding("picture").encoded(made)

    def __call__(self, encoded: Encoded) -> Path:
        return self.copied(encoded.item, Path())

    def copied(self, item: Item, file: Path) -> Path:  # noqa: ARG002
        return self._folder / f"{item.options['seed']}.png"


def by_batch(work: Work, folder: Path) -> float:
    from ..runtime.batch.ledger import Ledger
    from ..runtime.batch.painting import Here
    from ..runtime.batch.requests import Reading
    from ..runtime.batch.running import Batch
    from ..runtime.machine.hardware import Hardware
    from ..runtime.open_models import OpenModels
    from ..runtime.pipeline import MANY
    from ..runtime.planner.wishes import Wishes

    wishes = Wishes(requests=MANY, images_per_call=work.per_call, precision=work.precision)
    models = OpenModels(Hardware.detect(), None, wishes)
    models.pipeline(work.model, models.wished({})).generate(_warm(work))
    table = (
        (
            n,
            {name: value for name, value in row.items() if name != "steps"}
            | work.common
            | {"model": work.model},
        )
        for n, row in enumerate(work.rows, 1)
    )

    start = time.perf_counter()
    with Ledger(folder) as ledger:
        errors = ledger.ask(Reading().pictures(table))
        assert not errors, errors
        Batch(ledger, BySeed(folder), painter=Here(models)).run()
        plans = {record["plan"] for record in ledger.records()}
    sys.stderr.write("\n".join(filter(None, plans)) + "\n")
    return time.perf_counter() - start


def alone(work: Work, folder: Path) -> float:
    from ..runtime.pipeline import load

    with load(work.model, precision=work.precision) as pipe:
        pipe.generate(_warm(work))
        start = time.perf_counter()
        for row in work.rows:
            given = {name: value for name, value in row.items() if name not in ("prompt", "steps")}
            image = pipe(row["prompt"], **given, **work.common)
            assert not isinstance(image, list)
            image.save(folder / f"{row['seed']}.png")
        return time.perf_counter() - start


def by_diffusers(work: Work, folder: Path) -> float:
    import torch
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    from ..runtime.models.hub import BUILT_IN

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(work.precision, torch.float32)
    pipe: Any = DiffusionPipeline.from_pretrained(BUILT_IN.get(work.model, work.model), torch_dtype=dtype)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": work.rows[0]["steps"], "guidance_scale": GUIDANCE}
    first = work.rows[0]
    pipe(first["prompt"], width=first["width"], height=first["height"], **options)
    start = time.perf_counter()
    sizes = dict.fromkeys((row["width"], row["height"]) for row in work.rows)
    for width, height in sizes:
        alike = iter([row for row in work.rows if (row["width"], row["height"]) == (width, height)])
        while some := [*islice(alike, work.per_call)]:
            generators = [torch.Generator().manual_seed(row["seed"]) for row in some]
            prompts = [row["prompt"] for row in some]
            images = pipe(prompts, generator=generators, width=width, height=height, **options).images
            for row, image in zip(some, images, strict=True):
                image.save(folder / f"{row['seed']}.png")
    return time.perf_counter() - start


WAYS: dict[str, Callable[[Work, Path], float]] = {
    "batch": by_batch,
    "alone": alone,
    "diffusers": by_diffusers,
}


def _warm(work: Work) -> Any:
    from ..runtime.request import Request

    first = work.rows[0]
    return Request(first["prompt"], seed=0, width=first["width"], height=first["height"], **work.common)


def measured(way: str, work: Work, folder: Path) -> dict[str, Any]:
    """One way, in a process of its own."""
    given = json.dumps({"way": way, "folder": str(folder), "work": vars(work)})
    ran = subprocess.run(
        [sys.executable, "-m", "tightfit.benchmarks.batch", "--one", given],
        stdout=subprocess.PIPE, check=True, text=True,
    )  # fmt: skip
    return json.loads(ran.stdout.splitlines()[-1])


def one(given: str) -> None:
    """In that process."""
    said = json.loads(given)
    folder = Path(said["folder"])
    folder.mkdir()
    most, over = [0], threading.Event()
    watch = threading.Thread(target=_watch, args=(most, over), daemon=True)
    watch.start()
    seconds = WAYS[said["way"]](Work(**said["work"]), folder)
    over.set()
    watch.join()
    sys.stdout.write(json.dumps({"seconds": seconds, "process_bytes": most[0]}) + "\n")


def _watch(most: list[int], over: threading.Event) -> None:
    """The process's memory, 20 times a second: runs reset the system's own peak."""
    process = psutil.Process()
    while not over.wait(0.05):
        most[0] = max(most[0], process.memory_info().rss)


def worst(folder: Path, other: Path) -> float:
    from PIL import Image

    from ..runtime.batch.grid import psnr

    decibels = []
    for file in folder.glob("*.png"):
        with Image.open(file) as image, Image.open(other / file.name) as same:
            decibels.append(psnr(image, same))
    return min(decibels)


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--model", default="emoji")
    parse.add_argument("--pictures", type=int, default=300)
    parse.add_argument("--sizes", nargs="+", default=["64x64", "96x64", "64x96", "96x96"], metavar="WxH")
    parse.add_argument("--steps", type=int, default=8)
    parse.add_argument("--per-call", type=int, default=16, help="pictures at most")
    parse.add_argument("--precision", default="fp32")
    parse.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parse.add_argument("--one", help=argparse.SUPPRESS)
    args = parse.parse_args()
    if args.one:
        one(args.one)
        return
    pairs = [tuple(map(int, size.split("x"))) for size in args.sizes]
    sizes = [(width, height) for width, height in pairs]
    work = Work(args.model, rows(args.pictures, sizes, args.steps), args.per_call, args.precision)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for way in args.ways:
            results[way] = measured(way, work, Path(place) / way)
            results[way]["per_hour"] = 3600 * args.pictures / results[way]["seconds"]
            sys.stdout.write(f"{way}: {results[way]}\n")
        for way in args.ways:
            if "alone" in args.ways and way != "alone":
                results[way]["db"] = worst(Path(place) / way, Path(place) / "alone")
                sys.stdout.write(f"{way}: worst {results[way]['db']:.1f} dB beside alone\n")
    said = {"model": named(args.model), "pictures": args.pictures, "sizes": args.sizes, "steps": args.steps}
    record("batch", {**said, "precision": args.precision, "per_call": args.per_call, "ways": results})


if __name__ == "__main__":
    main()
