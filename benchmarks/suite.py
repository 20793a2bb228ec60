"""Every plan of a model on this machine, each in its own processes, in rounds, so that a slow spell of the
machine slows all.

Each process is one line of results.jsonl: model, request and plan with its predictions; `outcome` (ok, does
not fit, out of memory, failed) and why; seconds and bytes per stage; bytes on disk; quality against the best
precision's pictures of the same seeds; and the command, hardware and versions. Lines are appended as they
come, so a stopped run continues where it was; `rows` merges the rounds of a plan.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from .. import ModelSpec, Plan, Request, TightfitError
from ..runtime.errors import explained, first_line
from ..runtime.files import parsed, read_bytes, read_json
from ..runtime.models.families.networks import UNET
from ..runtime.pipeline import MANY
from ..runtime.placement import BACKENDS, PRECISIONS, STAGES
from ..runtime.planner.choose import plan as every_plan
from ..runtime.planner.plan import Verdict
from ..runtime.planner.wishes import Wishes
from .compare import as_before
from .record import named

VERSION = 2
# Prompts that emoji knows, four themes in turns.
PROMPTS = (
    "red heart", "cat", "pizza", "rocket",
    "broken heart", "dog face", "hamburger", "airplane",
    "green heart", "panda", "strawberry", "automobile",
    "grinning face", "fox", "banana", "sailboat",
    "smiling face with sunglasses", "penguin", "doughnut", "sunflower",
    "robot", "frog", "birthday cake", "cactus",
    "ghost", "butterfly", "hot beverage", "rainbow",
    "alien", "octopus", "ice cream", "snowman",
)  # fmt: skip
Row = dict[str, Any]
_MOST_BYTES = 2**28  # limit for a results file; a line has some 4,000
_BYTES, _SECONDS = (int, 0, 2**60), (float, 0.0, 1e9)
_STAGE = {"seconds": [_SECONDS], "load_seconds": [_SECONDS], "peak_bytes": _BYTES, "process_bytes": _BYTES}
# What each line must have, and what it must also have if it is ok: types, and bounds of numbers; {} allows
# anything.
_LINE = {
    "key": str, "round": (int, 0, 10**6), "reference": str, "model": str, "summary": str,
    "outcome": str, "why": str, "date": str,
    "command": str, "versions": {}, "request": dict.fromkeys(("width", "height", "steps"), (int, 1, 2 ** 16)),
    "hardware": {"name": str, "bytes": _BYTES, "threads": (int, 1, 10**6)},
    "plan": {
        "device": str, "cfg": str, "placements": {UNET.name: {"precision": PRECISIONS, "backend": BACKENDS}},
        "predicted": {"seconds": _SECONDS, "peak_bytes": _BYTES, "context_bytes": _BYTES,
                      "stages": dict.fromkeys(STAGES, _BYTES)},
    },
}  # fmt: skip
_MEASURED = {
    "seconds": [_SECONDS], "warmup_seconds": _SECONDS, "peak_bytes": _BYTES, "process_bytes": _BYTES,
    "disk_bytes": _BYTES,
    "stages": dict.fromkeys(STAGES, _STAGE), "quality": [{"psnr": (float, -1000.0, 1000.0)}],
}  # fmt: skip


@dataclass(frozen=True)
class Effort:
    """How much is measured per plan: `rounds` processes that each paint `pictures` of `steps`, each with its
    own seed and prompt; `seconds` is the time for everything."""

    steps: int = 20
    pictures: int = 1
    rounds: int = 3
    seconds: float = float("inf")


QUICK = Effort(rounds=1, seconds=100)
QUICK_STEPS = (20, 8, 4, 2, 1)  # the largest with which everything fits the time


@dataclass(frozen=True)
class Job:
    """One plan at one picture size. `budget` is the one asked for, if any; `reference` is the key of the job
    whose pictures its own are compared with."""

    spec: ModelSpec
    plan: Plan
    request: Request
    effort: Effort
    budget: int | None = None
    reference: str = ""

    @cached_property
    def key(self) -> str:
        """Equal for the same plan, request, weights and machine, whatever was predicted."""
        facts: list[Any] = [
            self.plan.hardware,
            self.plan.device,
            self.spec.name,
            self.budget,
            self.plan.cfg,
            _age(self.spec),
        ]
        facts += [as_before(asdict(placement)) for placement in self.plan.placements.values()]
        facts += [self.request.width, self.request.height, self.effort.steps, self.effort.pictures]
        facts += [self.plan.cached] if self.plan.cached else []  # keys of others are as they were
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @property
    def seconds(self) -> float:
        """Likely seconds per round: the process's start, a warm-up step, and each picture."""
        return (
            self.plan.predicted.seconds * (self.effort.pictures + 1 / self.effort.steps) + 4.0
            if self.plan.fits
            else 0.0
        )


def _age(spec: ModelSpec) -> int:
    """When the model's newest weights were written: another export to the same folder is another model."""
    files = [file for kind in ("safetensors", "onnx") for file in spec.folder.rglob(f"*.{kind}")]
    files += [spec.folder]  # of a checkpoint, the file itself
    return max((file.stat().st_mtime_ns for file in files if file.is_file()), default=0)


def jobs(
    spec: ModelSpec, plans: Sequence[Plan], request: Request, effort: Effort, budget: int | None = None
) -> list[Job]:
    """A job per plan. The best precision's comes first; the others' pictures are compared with its."""
    every = list(
        {job.key: job for job in (Job(spec, plan, request, effort, budget) for plan in plans)}.values()
    )
    exact = most_exact(job.plan for job in every)
    if not exact:
        return every
    best = next(job for job in every if job.plan is exact)
    return [replace(job, reference=best.key) for job in (best, *(job for job in every if job is not best))]


def in_time(todo: Sequence[Job]) -> list[Job]:
    """Order that learns most in the available time: the reference first, unless it would take most of the
    time, then the fastest first. Unchanged if there is time for all."""
    if not todo or todo[0].effort.seconds == float("inf"):
        return list(todo)
    first = [job for job in todo if job.key == job.reference and job.seconds < 0.4 * job.effort.seconds]
    return first + sorted((job for job in todo if job not in first), key=lambda job: job.seconds)


def most_exact(plans: Iterable[Plan]) -> Plan | None:
    """The fastest plan with the best precision that fits."""
    return min(
        (p for p in plans if p.fits), key=lambda p: (-p.predicted.psnr, p.predicted.seconds), default=None
    )


def choose(plans: Sequence[Plan], which: str) -> list[Plan]:
    """Choose among a planner's plans: all that would run under some budget, those that no other beats in
    everything, or the fastest per precision."""
    runnable = [plan for plan in plans if plan.verdict is not Verdict.REFUSED]
    if which == "all":
        return runnable
    fitting = [plan for plan in runnable if plan.fits]
    if which == "quick":
        kinds = {(p.precision, p.denoiser.backend, p.step_cache): p for p in reversed(fitting)}
        return list(kinds.values())[::-1]
    return [plan for plan in fitting if not any(rival.beats(plan) for rival in fitting)]


def candidates(hardware: Any, spec: ModelSpec, request: Request, wishes: Mapping[str, Any]) -> list[Plan]:
    """The planner's plans for many requests in a row, since each is timed after a warm-up."""
    return every_plan(hardware, spec, request, Wishes(**wishes, requests=MANY))


class Folder:
    """Where lines and pictures go."""

    def __init__(self, folder: Path, setup: Row) -> None:
        """`setup` is from `record.envelope`. Raises TightfitError for a file of something else, OSError if it
        cannot be written."""
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.pictures, self.setup = folder / "results.jsonl", folder / "pictures", setup
        self.pictures.mkdir(exist_ok=True)
        _end(self.file)
        self.lines = read(self.file)

    def missing(self, todo: Sequence[Job], again: bool = False) -> list[tuple[Job, int]]:
        """The rounds that this software and hardware have not measured, or all of them with `again`, round by
        round. What does not fit only has a first round."""
        rounds = range(max((job.effort.rounds for job in todo), default=0))
        complete = {
            (line["key"], line["round"]) for line in newest(self.lines) if not again and self._counts(line)
        }
        pairs = ((job, number) for number in rounds for job in todo if job.plan.fits or not number)
        return [(job, number) for job, number in pairs if (job.key, number) not in complete]

    def _counts(self, line: Row) -> bool:
        """Whether measuring again would change nothing."""
        return line["outcome"] in ("ok", "out of memory") and same_setup(line, self.setup)

    def measure(self, job: Job, number: int) -> Row:
        """Run the job as round `number`, from 0, and append a line."""
        line = self.setup | described(job) | {"round": number}
        line |= (
            run(job, number, self.pictures)
            if job.plan.fits
            else {"outcome": "does not fit", "why": job.plan.reason}
        )
        self._append(line | judged(self.pictures, job, line))
        return self.lines[-1]

    def _append(self, line: Row) -> None:
        self.lines.append(line)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")

    def rows(self, todo: Sequence[Job]) -> list[Row]:
        """A row per job that has lines. Lines compared with another reference are compared again."""
        by_key = {job.key: job for job in todo}
        for line in [line for line in newest(self.lines) if line["key"] in by_key]:
            job = by_key[line["key"]]
            if line["reference"] != job.reference or not line["quality"]:
                again = line | judged(self.pictures, job, line)
                if again != line:
                    self._append(again)
        row_of = {row["key"]: row for row in rows(self.lines)}
        return [row_of[key] for key in by_key if key in row_of]


def _end(file: Path) -> None:
    """Remove a last line that was cut off, as by a power cut, so that the next is not appended to it."""
    text = read_bytes(file, _MOST_BYTES) if file.exists() else b"\n"
    if not text.endswith(b"\n"):
        os.truncate(file, text.rfind(b"\n") + 1)


def measured(
    missing: Sequence[tuple[Job, int]], folder: Folder, tell: Callable[[Job], None] = lambda _: None
) -> Iterator[Row]:
    """Run jobs and append their lines; yields a row each. `tell` is called with each job before it runs."""
    start = time.perf_counter()
    for job, number in missing:
        passed = time.perf_counter() - start
        if passed + job.seconds > job.effort.seconds and (job, number) != missing[0]:
            return
        tell(job)
        yield added([folder.measure(job, number)])


def newest(lines: Iterable[Row]) -> list[Row]:
    """The last line of each round, if measured with the software and hardware of the job's last line."""
    by_key: dict[str, dict[int, Row]] = {}
    for line in lines:
        rounds = by_key.pop(line["key"], {})
        by_key[line["key"]] = {n: earlier for n, earlier in rounds.items() if same_setup(earlier, line)} | {
            line["round"]: line
        }
    return [rounds[number] for rounds in by_key.values() for number in sorted(rounds)]


def rows(lines: Iterable[Row]) -> list[Row]:
    """One row per job, from its newest lines."""
    return [added(list(group)) for _, group in groupby(newest(lines), key=lambda line: line["key"])]


def added(rounds: Sequence[Row]) -> Row:
    """Merges a plan's rounds into one row: all seconds in order, and the most bytes; `runs` has the median
    seconds of each process. A round that was not ok replaces the others."""
    last = next((line for line in rounds if line["outcome"] != "ok"), rounds[-1])
    if last["outcome"] != "ok":
        return last
    names = [name for name in last["stages"] if all(name in line["stages"] for line in rounds)]
    every = {name: [line["stages"][name] for line in rounds] for name in names}
    joules = [line["joules"] for line in rounds if line["joules"] is not None]
    return last | {
        **{
            field: _of_all(rounds, field)
            for field in ("seconds", "warmup_seconds", "peak_bytes", "process_bytes")
        },
        "stages": {
            name: {field: _of_all(records, field) for field in _STAGE} for name, records in every.items()
        },
        "runs": [statistics.median(line["seconds"]) for line in rounds],
        "joules": statistics.mean(joules) if joules else None,
        "quality": summed([picture for line in rounds for picture in line["quality"]]),
    }


def _of_all(rounds: Sequence[Row], field: str) -> Any:
    values = [line[field] for line in rounds]
    return [item for value in values for item in value] if isinstance(values[0], list) else max(values)


def summed(qualities: Sequence[Mapping[str, float]]) -> Row | None:
    """Medians over pictures of `metrics.compare`'s values, the worst PSNR, and the share of `match`."""
    if not qualities:
        return None
    middle = {"match": statistics.mean}
    names = [name for name in qualities[0] if all(name in quality for quality in qualities)]
    values = {
        name: middle.get(name, statistics.median)(quality[name] for quality in qualities) for name in names
    }
    return values | {"psnr_worst": min(quality["psnr"] for quality in qualities)}


def same_setup(line: Row, setup: Row) -> bool:
    return all(line[name] == setup[name] for name in ("hardware", "versions"))


def described(job: Job) -> Row:
    request, components = job.request, job.spec.components
    weights = [(components[name], placement.backend) for name, placement in job.plan.placements.items()]
    stored = sum(
        c.graph.stored_bytes if backend == "onnx" and c.graph else c.stored_bytes for c, backend in weights
    )
    return {
        "version": VERSION,
        "key": job.key,
        "model": named(job.spec.name),
        "request": {"width": request.width, "height": request.height, "steps": job.effort.steps},
        "budget": job.budget,
        "summary": job.plan.summary(),
        "plan": job.plan.to_json() | {"model": named(job.plan.model)},
        "disk_bytes": stored,
    }


def prompts(job: Job, number: int) -> list[tuple[str, int]]:
    """Prompts and seeds of round `number`."""
    first = number * job.effort.pictures
    return [(PROMPTS[i % len(PROMPTS)], i) for i in range(first, first + job.effort.pictures)]


def run(job: Job, number: int, pictures: Path) -> Row:
    """Run a job in its own process, so that its peak is its own and its crash is not ours."""
    options = {
        name: getattr(job.request, name) for name in ("width", "height", "guidance_scale", "scheduler")
    }
    task = {
        "plan": job.plan.to_json(),
        "model": job.spec.name,
        "options": options | {"num_inference_steps": job.effort.steps},
        "pictures": prompts(job, number),
        "folder": str(pictures / job.key),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tightfit.benchmarks.one"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode in (-9, 137):
        return {"outcome": "out of memory", "why": "the system ended the process (SIGKILL)"}
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return {"outcome": "out of memory" if "bad_alloc" in done.stderr else "failed", "why": last}
    return json.loads(done.stdout.splitlines()[-1])


def judged(pictures: Path, job: Job, line: Row) -> Row:
    """`reference` and `quality` of a line: one entry per picture, none if a picture is missing."""
    from PIL import Image

    from .metrics import compare, match

    qualities = []
    for prompt, seed in prompts(job, line["round"]) if line["outcome"] == "ok" else ():
        picture_file, exact = (pictures / key / f"{seed}.png" for key in (job.key, job.reference))
        if picture_file.exists() and exact.exists():
            unreadable = explained(
                f"{picture_file} or {exact} is no picture that can be compared", "remove it"
            )
            with unreadable, Image.open(picture_file) as picture, Image.open(exact) as target:
                qualities.append(
                    compare(picture, target)
                    | ({"match": match(picture, prompt)} if _is_emoji(job.spec) else {})
                )
    return {"reference": job.reference, "quality": qualities}


def _is_emoji(spec: ModelSpec) -> bool:
    """Whether this is the built-in model, or an export of it."""
    manifest = spec.folder / "tightfit.json"
    return manifest.exists() and read_json(manifest).get("source") in ("tightfit.export.emoji", "emoji")


def read(file: Path) -> list[Row]:
    """Lines of a results file; none if it does not exist. Raises TightfitError for another kind of file."""
    if not file.exists():
        return []
    lines, number = list[Row](), 0
    try:
        for text in read_bytes(file, _MOST_BYTES).splitlines():
            number += 1
            lines.append(_checked(parsed(text), file))
    except ValueError as error:
        raise TightfitError(
            f"line {number} of {file} is no result of 'tightfit bench' ({first_line(error)}): remove it"
        ) from None
    except OSError as error:
        raise TightfitError(f"{file} cannot be read ({error.strerror}): name another") from None
    return lines


def _checked(line: Any, file: Path) -> Row:
    """The line if it has everything that tables and plots need; else ValueError says what is wrong."""
    version = line.get("version") if isinstance(line, dict) else None
    if type(version) is int and version != VERSION:
        raise TightfitError(f"{file} has results of version {version}, not {VERSION}: measure again")
    _check(line, {"version": (int, VERSION, VERSION), **_LINE}, "it")
    if line["outcome"] == "ok":
        _check(line, _MEASURED, "it")
        for stage in line["stages"].values():
            _check(stage, _STAGE, "a stage")
        for picture in line["quality"]:
            _check(picture, dict.fromkeys(picture, (float, -1000.0, 1000.0)), "quality")
        if not min(line["seconds"], default=0) > 0:
            raise ValueError("seconds must be more than 0")
        if line.setdefault("joules", None) is not None:
            _check(line["joules"], (float, 0.0, 1e12), "joules")
    if line.setdefault("budget", None) is not None:
        _check(line["budget"], _BYTES, "budget")
    return line


def _check(value: Any, shape: Any, name: str) -> None:
    """ValueError if a JSON value does not have the shape that _LINE describes."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{name} is not an object")
        if absent := shape.keys() - value.keys():
            raise ValueError(f"{name} lacks {', '.join(sorted(absent))}")
        for key, part in shape.items():
            _check(value[key], part, key)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{name} is not a list")
        for item in value:
            _check(item, shape[0], name)
    elif isinstance(shape, tuple) and isinstance(shape[0], type):
        kind, least, most = shape
        if not isinstance(value, int | kind) or not least <= value <= most:
            raise ValueError(f"{name} is not a number from {least:g} to {most:g}")
    elif value not in shape if isinstance(shape, tuple) else not isinstance(value, shape):
        raise ValueError(f"{name} is {str(value)[:40]!r}")
