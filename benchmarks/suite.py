"""Every plan of a model on this machine: each is run in a process of its own, and becomes a row.

A row is one JSON object: model, request and plan with what was predicted; `outcome` (ok, does not fit, out of memory, failed)
and why; seconds and bytes of each stage; bytes on disk; quality beside the best precision's pictures of the same seeds; and the
command, hardware and versions. Rows are appended as they come, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import ModelSpec, Plan, Request, TightfitError
from ..runtime.pipeline import MANY
from ..runtime.plan import Wishes
from ..runtime.planner import plan as every_plan
from .record import envelope

VERSION = 1
PROMPTS = ("a red heart", "pizza", "cat", "rocket")
Row = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How much is measured of each plan: `steps` of each picture, how many `pictures`, one seed and prompt each; and after how
    many `seconds` no further plan is begun."""

    steps: int = 20
    pictures: int = 3
    seconds: float = float("inf")


QUICK = Effort(steps=2, pictures=1, seconds=60)


@dataclass(frozen=True)
class Job:
    """One plan for one size of picture; `budget` is what was asked for, if it was, and `reference` the key of the job with whose
    pictures its own are compared."""

    spec: ModelSpec
    plan: Plan
    request: Request
    effort: Effort
    budget: int | None = None
    reference: str = ""

    @property
    def key(self) -> str:
        """The same for the same plan, request and machine, but not for what was predicted of them."""
        what: list[Any] = [self.plan.hardware, self.plan.device, self.spec.name, self.budget, self.plan.cfg]
        what += [asdict(each) for each in self.plan.placements.values()]
        what += [self.request.width, self.request.height, self.effort.steps, self.effort.pictures]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]

    @property
    def seconds(self) -> float:
        """What it is likely to take: each picture, one to warm up, and a process that begins."""
        return self.plan.predicted.seconds * (self.effort.pictures + 1) + 4.0 if self.plan.fits else 0.0


def jobs(spec: ModelSpec, plans: Sequence[Plan], request: Request, effort: Effort, budget: int | None = None) -> list[Job]:
    """A job for each plan, the one of the best precision first, with whose pictures the others' are compared."""
    every = list({job.key: job for job in (Job(spec, plan, request, effort, budget) for plan in plans)}.values())
    fitting = [job for job in every if job.plan.fits]
    if not fitting:
        return every
    best = min(fitting, key=lambda job: (-job.plan.predicted.psnr, job.plan.predicted.seconds))
    return [replace(job, reference=best.key) for job in (best, *(job for job in every if job is not best))]


def choose(plans: Sequence[Plan], which: str) -> list[Plan]:
    """Of what a planner found: all that some budget would run, those that no other beats in everything, or the fastest of each
    precision."""
    known = [plan for plan in plans if plan.fits or not plan.reason.startswith("is refused")]
    if which == "all":
        return known
    fitting = [plan for plan in known if plan.fits]
    if which == "quick":
        return list({(p.precision, p.placements["unet"].backend): p for p in reversed(fitting)}.values())[::-1]
    return [plan for plan in fitting if not any(other.beats(plan) for other in fitting)]


def candidates(hardware: Any, spec: ModelSpec, request: Request, wishes: Mapping[str, Any]) -> list[Plan]:
    """What the planner says of many requests one after another, as each is timed after one that warms up."""
    return every_plan(hardware, spec, request, Wishes(**wishes, requests=MANY))


def measured(todo: Sequence[Job], folder: Path, command: str, tell: Callable[[Job], None]) -> Iterator[Row]:
    """Run each and append a row for it to the folder's results; `tell` is called with each before it is run."""
    begun = 0.0
    for job in todo:
        if begun > job.effort.seconds:
            return
        tell(job)
        start = time.perf_counter()
        row = envelope(command, job.plan.device) | described(job) | (run(job, folder / "pictures") if job.plan.fits else unfit(job))
        begun += time.perf_counter() - start
        if row["outcome"] == "ok":
            row["quality"] = quality(folder / "pictures", job)
        with (folder / "results.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        yield row


def described(job: Job) -> Row:
    request, components = job.request, job.spec.components
    weights = [(components[name], placement.backend) for name, placement in job.plan.placements.items()]
    stored = sum(c.graph.stored_bytes if backend == "onnx" and c.graph else c.stored_bytes for c, backend in weights)
    return {
        "version": VERSION,
        "key": job.key,
        "reference": job.reference,
        "model": job.spec.name,
        "request": {"width": request.width, "height": request.height, "steps": job.effort.steps, "pictures": job.effort.pictures},
        "summary": job.plan.summary(),
        "plan": job.plan.to_json(),
        "disk_bytes": stored,
    }


def unfit(job: Job) -> Row:
    return {"outcome": "does not fit", "why": job.plan.reason}


def run(job: Job, pictures: Path) -> Row:
    """In a process of its own, so that its peak is its own, and so that its end is not ours."""
    options = {name: getattr(job.request, name) for name in ("width", "height", "guidance_scale", "scheduler")}
    prompts = [[PROMPTS[i % len(PROMPTS)], i] for i in range(job.effort.pictures)]
    what = {
        "plan": job.plan.to_json(),
        "model": job.spec.name,
        "options": options | {"num_inference_steps": job.effort.steps},
        "pictures": prompts,
        "folder": str(pictures / job.key),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tightfit.benchmarks.one"], input=json.dumps(what), capture_output=True, text=True, check=False
    )
    if done.returncode in (-9, 137):
        return {"outcome": "out of memory", "why": "the system ended the process (SIGKILL)"}
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return {"outcome": "failed", "why": last}
    return json.loads(done.stdout.splitlines()[-1])


def quality(pictures: Path, job: Job) -> Row | None:
    """None where there is nothing to compare with."""
    from PIL import Image

    from .metrics import compare

    mine, others = (sorted((pictures / key).glob("*.png")) for key in (job.key, job.reference))
    if len(mine) != len(others) or not mine:
        return None
    return dict(compare([Image.open(file) for file in mine], [Image.open(file) for file in others]))


def read(file: Path) -> list[Row]:
    """The rows of a results file; none of one that is not there. Raises TightfitError for what is no such file."""
    if not file.exists():
        return []
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            if row["version"] != VERSION:
                raise TightfitError(f"{file} is of version {row['version']} of the results, not {VERSION}: measure again")
            rows.append(row | {"plan": Plan.from_json(json.dumps(row["plan"])).to_json()})
        except (ValueError, TypeError, KeyError) as error:
            raise TightfitError(f"line {number} of {file} is no result of 'tightfit bench' ({error}): remove it") from None
    return rows
