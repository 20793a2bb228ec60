"""`tightfit bench`: arguments become jobs for benchmarks/suite.py, rows become a table and a page."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_output import progress_bar, show_table, write
from .errors import TightfitError, explained
from .hardware import Hardware
from .memory import parse_bytes
from .plan import Plan, Wishes
from .request import Request

if TYPE_CHECKING:
    from ..benchmarks.suite import Job
    from .spec import ModelSpec

app = typer.Typer(invoke_without_command=True, help="Measure every way to run a model here; compare with 'bench compare'.")
_WAYS = ("auto", "all", "quick")


@app.callback()
def bench(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="emoji, a folder or a hub id.", metavar="MODEL")] = "emoji",
    plans: Annotated[str, typer.Option(help="auto (what no other beats), all, or FILE,FILE.", metavar="WHICH")] = "auto",
    sizes: Annotated[str | None, typer.Option(help="256,512x768; default: model's.", metavar="LIST")] = None,
    steps: Annotated[int, typer.Option(help="Of each picture.", metavar="N")] = 20,
    pictures: Annotated[int, typer.Option(help="Timed, after one to warm up.", metavar="N")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="Under two minutes: the fastest of each precision, 2 steps.")] = False,
    hardware: Annotated[str, typer.Option(help="here, which is all that can be measured.", metavar="NAME")] = "here",
    device: Annotated[str, typer.Option(help="auto, cuda, xpu, mps, cpu.", metavar="NAME")] = "auto",
    precision: Annotated[str, typer.Option(help="Only this one, and fp32.", metavar="NAME")] = "auto",
    backend: Annotated[str, typer.Option(help="auto, torch, onnx.", metavar="NAME")] = "auto",
    vram: Annotated[str | None, typer.Option("--vram", "--ram", help="Keep to it: 4GiB.", metavar="BYTES")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of results.jsonl and pictures.", metavar="DIR")] = Path(
        "tightfit-bench"
    ),
    report: Annotated[Path | None, typer.Option(help="Also write one page with plots and pictures.", metavar="HTML")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure also what the folder has already.")] = False,
) -> None:
    """Run each way to paint with a model in a process of its own: seconds, bytes and quality, predicted and measured."""
    if context.invoked_subcommand:
        return
    if hardware != "here":
        raise TightfitError(
            f"{hardware} is not here to be measured: see what is predicted with 'tightfit plan --hardware {hardware}'"
        )
    suite = _suite()
    effort = suite.QUICK if quick else suite.Effort(steps, pictures)
    if effort.pictures < 1:
        raise TightfitError("--pictures counts from 1 up")
    from .hub import inspect

    spec, machine = inspect(model), Hardware.detect(device)
    wishes = {"precision": precision, "backend": backend, "budget": None if vram is None else parse_bytes(vram, "--vram or --ram")}
    todo: list[Job] = []
    for width, height in _sizes(sizes):
        request = Request("a", None, width, height, effort.steps, scheduler="euler").resolve(spec)
        chosen = _plans(machine, spec, request, wishes, "quick" if quick and plans == "auto" else plans)
        todo += suite.jobs(spec, chosen, request, effort, wishes["budget"])
    rows = _measure(todo, output, again)
    _print(rows, machine)
    if report:
        _page(report, rows, output)


@app.command()
def compare(
    files: Annotated[list[Path], typer.Argument(help="results.jsonl of two runs, or more.", metavar="A.jsonl B.jsonl …")],
) -> None:
    """Say what got better or worse beyond noise: exit code 1 if anything got worse. Of several machines, a column for each."""
    from rich.console import Console

    _suite()
    from ..benchmarks import compare as side
    from ..benchmarks.suite import read

    for file in files:
        if not file.is_file():
            raise TightfitError(f"{file} is no file: name a results.jsonl of 'tightfit bench'")
    if len(files) < 2:
        raise TightfitError("there is nothing to compare with: name two results files or more")
    tables = [side.newest(read(file)) for file in files]
    console = Console(highlight=False, markup=False, soft_wrap=True)
    machines = [sorted({row["hardware"]["name"] for row in rows.values()}) for rows in tables]
    for line, cells in side.merged(tables):
        console.print(f"{line}: " + " | ".join(cells))
    if len(files) > 2 or machines[0] != machines[1]:
        console.print("columns: " + " | ".join(f"{file} ({', '.join(names)})" for file, names in zip(files, machines, strict=True)))
        return
    before, after = tables
    both = [key for key in before if key in after]
    found = [change for key in both for change in side.changes(before[key], after[key])]
    for change in found:
        word = "better" if change.better else "worse"
        console.print(f"{word}: {change.what} {change.before} → {change.after}, {change.plan}")
    worse = sum(not change.better for change in found)
    alone = len(before) + len(after) - 2 * len(both)
    console.print(f"{len(both)} plans in both, {alone} in one only: {worse} figures worse, {len(found) - worse} better")
    if worse:
        raise typer.Exit(1)


def _suite() -> Any:
    with explained("the benchmark cannot be run", "pip install 'tightfit[bench]'"):
        import torchmetrics  # noqa: F401

        from ..benchmarks import suite
    return suite


def _sizes(text: str | None) -> Iterator[tuple[int | None, int | None]]:
    """Width and height of each: "256,512x768"."""
    for part in text.split(",") if text else [""]:
        sides = part.strip().split("x")
        if text and (len(sides) > 2 or not all(side.isdecimal() for side in sides)):
            raise TightfitError(f"--sizes are pixels such as 256,512x768, not '{part}'")
        yield (int(sides[0]), int(sides[-1])) if text else (None, None)


def _plans(machine: Hardware, spec: ModelSpec, request: Request, wishes: Mapping[str, Any], which: str) -> list[Plan]:
    from ..benchmarks import suite
    from . import planner

    known = suite.candidates(machine, spec, request, wishes)
    if which in _WAYS:
        best = [] if wishes["precision"] == "auto" else suite.candidates(machine, spec, request, {**wishes, "precision": "auto"})
        exact = max((p for p in best if p.fits), key=lambda p: (p.predicted.psnr, -p.predicted.seconds), default=None)
        chosen = suite.choose(known, which)
        if not any(plan.fits for plan in chosen) and which != "all":
            raise planner.none_fits(known, machine, spec, request, Wishes(**wishes))
        return [*chosen, *([exact] if exact else [])]
    files = [Path(part) for part in which.split(",")]
    return [planner.checked(Plan.read(file), machine, spec, request, Wishes(**wishes)) for file in files]


def _measure(todo: Sequence[Job], output: Path, again: bool) -> list[dict[str, Any]]:
    """The rows of all jobs, those that the folder has and those that are measured now."""
    from ..benchmarks import suite

    try:
        output.mkdir(parents=True, exist_ok=True)
        there = {} if again else {row["key"]: row for row in suite.read(output / "results.jsonl")}
        left = [job for job in todo if job.key not in there]
        if len(left) < len(todo):
            known = len(todo) - len(left)
            typer.echo(f"{known} of {len(todo)} plans are in {output} already; --again measures them again", err=True)
        command = shlex.join(["tightfit", *sys.argv[1:]])
        with _told(left) as (begin, end):
            for row in suite.measured(left, output, command, begin):
                there[row["key"]] = row
                end(row)
    except KeyboardInterrupt:
        typer.echo(f"what is measured is in {output}: the same command goes on from there", err=True)
        raise
    except OSError as error:
        raise TightfitError(f"{output} cannot be written ({error.strerror}): name another folder with --output") from None
    rows = [there[job.key] for job in todo if job.key in there]
    if len(rows) < len(todo):
        typer.echo(f"{len(todo) - len(rows)} plans were not begun, as the time was over: the same command goes on", err=True)
    return rows


@contextmanager
def _told(jobs: Sequence[Job]) -> Iterator[tuple[Callable[[Job], None], Callable[[dict[str, Any]], None]]]:
    """What to call before each job and after it: a bar with the time left, or lines where there is no terminal."""
    expected, start = {job.key: job.seconds for job in jobs}, time.perf_counter()
    with progress_bar(48) as bar:
        task = bar.add_task("", total=len(jobs))

        def begin(job: Job) -> None:
            done = sum(job.seconds for job in jobs) - sum(expected.values())
            pace = (time.perf_counter() - start) / done if done else 1.0
            left = sum(expected.values()) * pace
            bar.update(task, description=f"{left / 60:.0f} min left · {job.plan.summary()}"[:48])

        def end(row: dict[str, Any]) -> None:
            expected.pop(row["key"])
            bar.advance(task)
            bar.console.print(f"{len(jobs) - len(expected)}/{len(jobs)} {_line(row)}", markup=False, soft_wrap=True)

        yield begin, end


def _line(row: Mapping[str, Any]) -> str:
    from ..benchmarks.compare import figures

    why = f" ({row['why']})" if row["why"] else ""
    return f"{row['summary']}: {figures(row)}{why}"


_WIDE = 150  # columns of a terminal that has room for the table


def _print(rows: Sequence[dict[str, Any]], machine: Hardware) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ..benchmarks.report import COLUMNS, cells

    table = Table(title=f"on {machine.name}", title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if number else "left", no_wrap=number > 0)
    for row in rows:
        rest = cells(row) if row["outcome"] == "ok" else [row["outcome"]]
        table.add_row(row["summary"], *rest, style=None if row["outcome"] == "ok" else "dim")
    show_table(table, [(_line(row), None) for row in rows], _WIDE)


def _page(file: Path, rows: list[dict[str, Any]], output: Path) -> None:
    from ..benchmarks.report import page

    write(file, page(rows, output / "pictures"))
    typer.echo(f"{file} · {len(rows)} plans")
