"""`tightfit bench`: arguments become jobs for benchmarks/suite.py; rows become a table and a page."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime import interrupts
from ..runtime.cli.options import MODEL, taking
from ..runtime.cli.output import TEXT, progress_bar, say, say_json, show_table, write
from ..runtime.errors import TightfitError, explained, printable
from ..runtime.machine.hardware import Hardware
from ..runtime.planner.plan import Plan
from ..runtime.planner.wishes import Wishes
from ..runtime.request import Request
from ..runtime.texts import TEXTS
from ..runtime.units import parse_bytes

if TYPE_CHECKING:
    from ..runtime.models.spec import ModelSpec
    from .suite import Effort, Job

app = typer.Typer(
    invoke_without_command=True, help="Measure every way to run a model here; compare with 'bench compare'."
)
_WAYS = ("auto", "all", "quick")


_WHICH = "auto: those no other beats. all. quick: the fastest per precision. Or FILE,FILE."
_PLANS = typer.Option(help=_WHICH, metavar="WHICH")
_SIZES = typer.Option(help="256,512x768; default: model's.", metavar="LIST")
_STEPS = typer.Option(help="Per picture: 20.", metavar="N")
_PICTURES = typer.Option(help="Timed per process, after a warm-up step: 1.", metavar="N")
_ROUNDS = typer.Option(help="Processes per plan, in turns with the others': 3.", metavar="N")
_QUICK = typer.Option("--quick", help="Two minutes: --plans quick --rounds 1, 20 steps or as many as fit.")
_HARDWARE = typer.Option(help="Only 'here' can be measured.", metavar="NAME")
_DEVICE = typer.Option(help="auto, cuda, xpu, mps, cpu.", metavar="NAME")
_PRECISION = typer.Option(help="Only this one and the best.", metavar="NAME")
_BACKEND = typer.Option(help="auto, torch, onnx.", metavar="NAME")
_PREFER = typer.Option(help="balanced, speed: also with cached steps.", metavar="NAME")
_VRAM = typer.Option("--vram", "--ram", help="Budget, such as 4GiB.", metavar="BYTES")
_OUTPUT = typer.Option("-o", "--output", help="Folder for results.jsonl and pictures.", metavar="DIR")
_REPORT = typer.Option(help="Also write one page with plots and pictures.", metavar="HTML")


@dataclass(frozen=True)
class Options:
    """The options of `tightfit bench`."""

    context: typer.Context
    model: Annotated[str, MODEL] = "emoji"
    plans: Annotated[str | None, _PLANS] = None
    sizes: Annotated[str | None, _SIZES] = None
    steps: Annotated[int | None, _STEPS] = None
    pictures: Annotated[int | None, _PICTURES] = None
    rounds: Annotated[int | None, _ROUNDS] = None
    quick: Annotated[bool, _QUICK] = False
    hardware: Annotated[str, _HARDWARE] = "here"
    device: Annotated[str, _DEVICE] = "auto"
    precision: Annotated[str, _PRECISION] = "auto"
    backend: Annotated[str, _BACKEND] = "auto"
    prefer: Annotated[str, _PREFER] = "quality"
    vram: Annotated[str | None, _VRAM] = None
    output: Annotated[Path, _OUTPUT] = Path("tightfit-bench")
    report: Annotated[Path | None, _REPORT] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False
    again: Annotated[bool, typer.Option("--again", help="Also repeat what the folder already has.")] = False

    def check(self) -> None:
        """Raise TightfitError for what cannot be measured or written."""
        if self.hardware != "here":
            cure = f"'tightfit plan --hardware {self.hardware}' predicts it"
            raise TightfitError(f"{self.hardware} is not this machine, so it cannot be measured: {cure}")
        if self.report and not (folder := self.report.absolute().parent).is_dir():
            raise TightfitError(f"there is no folder {folder}: make it, or name another place for --report")
        if self.report and self.report.is_dir():
            raise TightfitError(f"--report {self.report} is a folder: name a file in it")

    def efforts(self, suite: Any) -> list[Effort]:
        """Efforts to choose from: the first one that fits the time is used, else the last."""
        names = ("steps", "pictures", "rounds")
        counts = {name: count for name in names if (count := getattr(self, name)) is not None}
        for name, count in counts.items():
            if count < 1:
                raise TightfitError(f"--{name} must be at least 1, not {count}")
        effort = replace(suite.QUICK if self.quick else suite.Effort(), **counts)
        in_time = self.quick and self.steps is None
        return [replace(effort, steps=steps) for steps in suite.QUICK_STEPS] if in_time else [effort]

    def wishes(self) -> dict[str, Any]:
        """Fields of Wishes."""
        budget = None if self.vram is None else parse_bytes(self.vram, "--vram or --ram")
        return {
            "precision": self.precision,
            "backend": self.backend,
            "prefer": self.prefer,
            "budget": budget,
        }


@app.callback()
@taking(Options)
def bench(options: Options) -> None:
    """Run each way to paint with a model in its own processes.

    Reports seconds, bytes and quality, predicted and measured.
    """
    if options.context.invoked_subcommand:
        _refuse_options(options.context)
    else:
        _bench(options)


def _bench(options: Options) -> None:
    options.check()
    TEXTS.keep(False)  # nor do the processes that measure
    suite = _suite()
    efforts = options.efforts(suite)
    from ..runtime.models.hub import inspect

    spec, machine, wishes = inspect(options.model), _detected(options.device), options.wishes()
    plans = options.plans or ("quick" if options.quick else "auto")
    todo: list[Job] = []
    for effort in efforts:
        todo = _jobs(spec, machine, wishes, options.sizes, plans, effort)
        # The margin is for predictions, which are best cases.
        if sum(job.seconds for job in todo) * effort.rounds <= 0.75 * effort.seconds:
            break
    rows = _measure(suite.in_time(todo), options.output, machine, options.again)
    if options.as_json:
        say_json(rows)
    else:
        _print(rows, machine, {job.key for job in todo if job.plan.chosen})
    if options.report and rows:
        _page(options.report, rows, options.output)
    if any(row["outcome"] == "failed" for row in rows):
        raise typer.Exit(1)


def _refuse_options(context: typer.Context) -> None:
    """Raise TightfitError for options of `bench` typed before a subcommand, which measures nothing."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    if typed := [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]:
        raise TightfitError(f"'bench {context.invoked_subcommand}' measures nothing: leave out --{typed[0]}")


@app.command()
def compare(
    files: Annotated[
        list[Path], typer.Argument(help="results.jsonl of two or more runs.", metavar="A.jsonl B.jsonl …")
    ],
) -> None:
    """Say what got better or worse beyond noise between two files of one machine. Exit code 1 if anything got
    worse or is missing.

    With several machines or more files, only show the figures side by side.
    """
    from . import compare as side

    tables = _tables(files)
    machines = [side.machine(table.values()) for table in tables]
    heads = [f"{file}\n{name}" for file, name in zip(_results(files), machines, strict=True)]
    _side_by_side(heads, list(side.merged(tables)))
    if len(files) > 2 or machines[0] != machines[1]:
        say("nothing is judged: only two files of one machine are")
    elif _is_worse(*tables):
        raise typer.Exit(1)


def _results(files: Sequence[Path]) -> list[Path]:
    return [file / "results.jsonl" if file.is_dir() else file for file in files]


def _tables(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of each file, by what they measured."""
    from . import compare as side
    from .suite import read, rows

    if len(files) < 2:
        raise TightfitError("nothing to compare with: name two or more results files")
    tables = []
    for file in _results(files):
        if not file.is_file():
            raise TightfitError(f"{file} is no file: name a results.jsonl of 'tightfit bench'")
        tables.append(side.by_identity(rows(read(file))))
        if not tables[-1]:
            raise TightfitError(f"{file} has no results: name another, or measure with 'tightfit bench'")
    return tables


def _is_worse(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Say what changed beyond noise between two tables of one machine. True if anything got worse or is
    missing."""
    from . import compare as side

    for line in side.versions(before.values(), after.values()):
        say(f"differs: {line}")
    both = [key for key in before if key in after]
    if not both:
        raise TightfitError("no plan is in both files: measure the same model, sizes and steps in each")
    changes = [change for key in both for change in side.changes(before[key], after[key])]
    for change in changes:
        verdict = "better" if change.better else "worse"
        say(f"{verdict}: {change.what} {change.before} → {change.after}, {change.plan}")
    missing = [side.name(row) for key, row in before.items() if key not in after]
    for name in missing:
        say(f"missing: {name}")
    runs = {key: min(_runs(before[key]), _runs(after[key])) for key in both if before[key]["outcome"] == "ok"}
    if few := sum(count < side.FEW for count in runs.values()):
        say(f"seconds of {few} plans are not judged: they need {side.FEW} processes each (--rounds)")
    worse = sum(not change.better for change in changes)
    better = len(changes) - worse
    say(f"{len(both)} plans in both, {len(missing)} missing: {worse} figures worse, {better} better")
    return bool(worse or missing)


def _runs(row: Mapping[str, Any]) -> int:
    return len(row.get("runs", ()))


def _side_by_side(heads: Sequence[str], lines: Sequence[tuple[str, list[str]]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table

    table = Table(
        Column("plan", max_width=TEXT),
        *("\n".join(map(printable, head.split("\n"))) for head in heads),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for text, row in lines:
        table.add_row(*map(printable, (text, *row)))
    texts = [((f"{text}: {' | '.join(row)}",), None) for text, row in lines]
    columns = " | ".join(head.replace("\n", " ") for head in heads)
    show_table(None, table, [((columns,), None), *texts])


def _detected(device: str) -> Hardware:
    """Hardware of the device. On a GPU it is detected in another process, so that this one holds none of its
    memory while others are measured."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return Hardware.detect(device)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(Hardware.detect, device).result()


def _suite() -> Any:
    with explained("the benchmark cannot be run", "pip install 'tightfit[bench]'"):
        import torchmetrics  # noqa: F401

        from . import suite
    return suite


def _sizes(text: str | None) -> Iterator[tuple[int | None, int | None]]:
    """Width and height of each entry in "256,512x768"."""
    for part in [""] if text is None else text.split(","):
        sides = part.strip().split("x")
        if text is not None and (len(sides) > 2 or not all(side.isdecimal() for side in sides)):
            raise TightfitError(f"--sizes are pixels such as 256,512x768, not '{part}'")
        yield (None, None) if text is None else (int(sides[0]), int(sides[-1]))


def _jobs(
    spec: ModelSpec,
    machine: Hardware,
    wishes: Mapping[str, Any],
    sizes: str | None,
    plans: str,
    effort: Effort,
) -> list[Job]:
    """What is to be measured at every size, each job once."""
    from . import suite

    todo: dict[str, Job] = {}
    for width, height in _sizes(sizes):
        request = Request("a", None, width, height, effort.steps, scheduler="euler").resolve(spec)
        chosen = _plans(machine, spec, request, wishes, plans)
        todo |= {job.key: job for job in suite.jobs(spec, chosen, request, effort, wishes["budget"])}
    return list(todo.values())


def _plans(
    machine: Hardware, spec: ModelSpec, request: Request, wishes: Mapping[str, Any], which: str
) -> list[Plan]:
    """The plans asked for, and the best precision's, which they are compared with."""
    from ..runtime.planner import choose as planner
    from . import suite

    candidates = suite.candidates(machine, spec, request, wishes)
    if which in _WAYS:
        chosen = suite.choose(candidates, which)
        if not any(plan.fits for plan in chosen) and which != "all":
            raise planner.none_fits(candidates, machine, request.resolve(spec), Wishes(**wishes))
    else:
        files = [Path(part) for part in which.split(",")]
        for file in files:
            if not file.is_file():
                raise TightfitError(
                    f"there is no plan {file}: --plans is {', '.join(_WAYS)}, "
                    "or files of 'tightfit plan --save'"
                )
        chosen = [
            planner.checked(Plan.read(file), machine, request.resolve(spec), Wishes(**wishes))
            for file in files
        ]
    every = (
        candidates
        if wishes["precision"] == "auto"
        else suite.candidates(machine, spec, request, {**wishes, "precision": "auto"})
    )
    exact = suite.most_exact(every)
    return [*chosen, *([exact] if exact else [])]


def _measure(todo: Sequence[Job], output: Path, machine: Hardware, again: bool) -> list[dict[str, Any]]:
    """The rows of all jobs: those already in the folder and those measured now."""
    from . import suite
    from .record import envelope, typed

    interrupts.tidily()
    try:
        folder = suite.Folder(output, envelope(typed(["tightfit", *sys.argv[1:]]), machine))
        every = folder.missing(todo, again=True)
        missing = every if again else folder.missing(todo)
        if len(missing) < len(every):
            say(
                f"{len(every) - len(missing)} of {len(every)} runs are already in {output}; "
                "--again repeats them",
                err=True,
            )
        remaining = len(missing)
        if missing:
            with _told(missing) as (begin, end):
                for line in suite.measured(missing, folder, begin):
                    end(line)
                    remaining -= 1
        if remaining:
            say(f"out of time with {remaining} runs left: the same command continues", err=True)
        return folder.rows(todo)
    except KeyboardInterrupt:
        say(f"{output} has what was measured: the same command continues from there", err=True)
        raise
    except OSError as error:
        raise TightfitError(
            f"{output} cannot be written ({error.strerror}): name another folder with --output"
        ) from None


@contextmanager
def _told(
    missing: Sequence[tuple[Job, int]],
) -> Iterator[tuple[Callable[[Job], None], Callable[[dict[str, Any]], None]]]:
    """Progress callbacks for before and after each run: a bar with the time left, or lines without a
    terminal."""
    estimates, start = [job.seconds for job, _ in missing], time.perf_counter()
    total_seconds = sum(estimates)
    with progress_bar(48) as bar:
        task = bar.add_task("", total=len(missing))

        def begin(job: Job) -> None:
            done = total_seconds - sum(estimates)
            seconds = sum(estimates) * ((time.perf_counter() - start) / done if done else 1.0)
            bar.update(task, description=f"{seconds / 60:.0f} min left · {job.plan.summary()}"[:48])

        def end(line: dict[str, Any]) -> None:
            del estimates[0]
            bar.advance(task)
            text = printable(f"{len(missing) - len(estimates)}/{len(missing)} {_line(line)}")
            bar.console.print(text, markup=False, emoji=False, soft_wrap=True)

        yield begin, end


def _line(row: Mapping[str, Any]) -> str:
    from .compare import figures

    why = f" ({row['why']})" if row["why"] else ""
    return f"{row['summary']}: {figures(row)}{why}"


# Width of a terminal with room for all columns; a narrower one gets only these.
_WIDE, _NARROW = (
    150,
    ("s/picture", "±", "predicted s", "saves", "peak", "dB"),
)


def _print(rows: Sequence[dict[str, Any]], machine: Hardware, chosen: set[str]) -> None:
    """A table per size, then advice. `chosen` are the keys of the plans that tightfit would take."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from . import report
    from .compare import seconds

    console = Console(highlight=False)
    for group in report.groups(rows):
        columns, lines = report.table(group)
        kept = [
            i
            for i, name in enumerate(columns)
            if name in _NARROW or not console.is_terminal or console.width >= _WIDE
        ]
        title = f"{report.title(group)} on {machine.name}"
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("plan", max_width=TEXT)
        for i in kept:
            table.add_column(columns[i], justify="right", no_wrap=True)
        for row, cells in lines:
            name = f"{row['summary']}: {row['outcome']}" if not cells else row["summary"]
            table.add_row(printable(name), *(cells[i] for i in kept if cells), style=None if cells else "dim")
        show_table(title, table, [((_line(row),), None) for row, _ in lines])
        for line in report.advice(group):
            say(line)
        ran = [row for row in group if row["outcome"] == "ok"]
        for row in ran:
            if row["key"] in chosen:
                ratio = seconds(row) / min(map(seconds, ran))
                say(f"tightfit takes: {_line(row)}; {ratio:.2f} of the fastest's seconds")
        for row in group:
            if row["outcome"] not in ("ok", "does not fit"):
                say(_line(row))
    if not machine.calibrated:
        say("predicted seconds are rough: 'tightfit calibrate' measures this machine's rates, once")


def _page(file: Path, rows: list[dict[str, Any]], output: Path) -> None:
    from .report import page

    write(file, page(rows, output / "pictures"))
    say(f"{file} · {len(rows)} plans", err=True)
