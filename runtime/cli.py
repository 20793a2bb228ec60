"""The command line: arguments become a Request, events become a progress bar and one closing line. No logic of its own."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from .. import __version__
from .errors import TightfitError
from .events import Event, Result
from .memory import shown
from .plan import PRECISIONS, Plan
from .request import Request
from .schedulers import SCHEDULERS

if TYPE_CHECKING:
    from .parameters import Carried
    from .pipeline import Pipeline

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})

_Model = Annotated[str | None, typer.Option(help="emoji, a folder or a hub id.", metavar="MODEL")]
_Precision = Annotated[str | None, typer.Option(help=f"{', '.join(PRECISIONS)}.", metavar="NAME")]
_Device = Annotated[str, typer.Option(help="auto, cuda, mps, cpu.", metavar="NAME")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Stable Diffusion that fits the card you have.  [bold]tightfit "a red heart"[/bold] is short for generate."""
    if version:
        typer.echo(f"tightfit {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to paint; - reads standard input.", show_default=False)] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Prompt from a file.", metavar="FILE")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="Repeat that picture.", metavar="PNG")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to paint.", metavar="TEXT")] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option("--num-inference-steps", "--steps", help="Default 20.", metavar="N")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: model's.", metavar="X")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; default: model's.", metavar="N")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; default: model's.", metavar="N")] = None,
    seed: Annotated[int | None, typer.Option(help="Default random.", metavar="N")] = None,
    scheduler: Annotated[str | None, typer.Option(help=f"{', '.join(SCHEDULERS)}.", metavar="NAME")] = None,
    num_images: Annotated[int | None, typer.Option(help="From seed, seed + 1 …", metavar="N")] = None,
    model: _Model = None,
    precision: _Precision = None,
    device: _Device = "auto",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="PNG file or folder.", metavar="PATH")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Paint a picture from a prompt."""
    given = {
        "prompt": _prompt(prompt, prompt_file),
        "negative_prompt": negative_prompt,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "width": width,
        "height": height,
        "seed": seed,
        "scheduler": scheduler,
        "num_images": num_images,
    }
    given = {name: value for name, value in given.items() if value is not None}
    carried = _carried(source)
    request = Request(**{"prompt": "", **carried.request, **given}).checked()
    target = _target(output, request.prompt, request.num_images)
    if source and not (model or carried.model):
        raise TightfitError(f"{source} does not say where its model is: name it with --model")
    where = model or carried.model or "emoji"
    fetch = source is None or model is not None  # a picture alone never starts a download
    with _load(where, precision or carried.precision or "auto", device, local_files_only=not fetch) as pipeline:
        result = _run(pipeline, request)
    named = output is not None and not output.is_dir() and request.num_images == 1
    paths = _save(result, *target, overwrite=named)
    typer.echo(json.dumps(_report(result, paths)) if as_json else _closing_line(result, paths))


@app.command("plan")
def show_plan(
    model: _Model = "emoji",
    precision: _Precision = "auto",
    device: _Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say how a model would run here, and why; no weight is read."""
    from rich.console import Console

    plan = _load(model or "emoji", precision or "auto", device).plan
    if as_json:
        typer.echo(json.dumps(plan.to_json(), ensure_ascii=False))
    else:
        Console().print(_table(plan), *(f"• {reason}" for reason in plan.reasons), sep="\n", highlight=False)


def _table(plan: Plan):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    style = {"title_justify": "left", "title_style": "bold", "box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
    table = Table(title=f"{plan.model}: {plan.summary()}", **style)
    table.add_column("component", no_wrap=True, min_width=14)
    for column in ("backend", "precision", "residency", "attention", "tiling"):
        table.add_column(column)
    table.add_column("weights", justify="right")
    for name, p in plan.placements.items():
        table.add_row(name, p.backend, p.precision, p.residency, p.attention, p.tiling, shown(p.weight_bytes))
    table.add_section()
    table.add_row("most at once", "", "", "", "", "", shown(plan.weight_bytes))
    return table


def _prompt(prompt: str | None, file: Path | None) -> str | None:
    if prompt is not None and file is not None:
        raise TightfitError("give the prompt as an argument or with --prompt-file, not both")
    try:
        if prompt == "-":
            return sys.stdin.read().strip() if sys.stdin else ""
        return prompt if file is None else file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise TightfitError(f"{file or 'standard input'} is not UTF-8 text") from None
    except OSError as error:
        raise TightfitError(f"{file} cannot be read: {error.strerror}") from None


def _carried(source: Path | None) -> Carried:
    """What the picture `source` asks for, nothing without one."""
    from .parameters import Carried, read

    carried = read(source) if source else Carried({})
    for notice in carried.notices:
        typer.echo(f"note: {notice}", err=True)
    return carried


def _target(output: Path | None, prompt: str, num_images: int) -> tuple[Path, str]:
    """Folder and file name to write to, checked before anything is computed."""
    words = "-".join(re.findall(r"\w+", prompt.lower())).encode()[:60].decode(errors="ignore").strip("-")
    folder, name = Path(), f"{words or 'picture'}.png"
    try:
        if output is not None and output.is_dir():
            folder = output
        elif output is not None:
            if output.suffix.lower() != ".png":
                raise TightfitError(f"--output {output} is no folder that exists (make it first) and does not end in .png")
            folder, name = output.parent, output.name
        if not folder.is_dir():
            raise TightfitError(f"the folder {folder} does not exist: make it first, or name another with --output")
        with suppress(FileNotFoundError):
            (folder / f"{num_images}-{name}").lstat()  # too long a name for the file system fails here, not after the work
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise TightfitError(
            f"nothing can be written to {folder / name} ({error.strerror}): name another place with --output"
        ) from None
    return folder, name


def _load(model: str, precision: str, device: str, *, local_files_only: bool = False) -> Pipeline:
    """A pipeline that keeps nothing: one run of the command needs each component once."""
    from .pipeline import load

    return load(model, precision=precision, device=device, residency="staged", local_files_only=local_files_only)


def _run(pipeline: Pipeline, request: Request) -> Result:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<8}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("loading", total=1)

        def show(event: Event) -> None:
            for notice in event.notices:
                console.print(f"note: {notice}", markup=False, highlight=False, soft_wrap=True)
            bar.update(task, description=event.stage, completed=event.step, total=event.steps)

        return pipeline.generate(request, show)


def _save(result: Result, folder: Path, name: str, overwrite: bool) -> list[Path]:
    """Write every picture; a name that was not asked for never replaces a file."""
    from .parameters import save

    stem, suffix = Path(name).stem, Path(name).suffix
    paths = []
    for i, image in enumerate(result.images):
        numbered = f"{stem}-{i + 1}" if len(result.images) > 1 else stem
        path, more = folder / f"{numbered}{suffix}", 1
        while path.exists() and not overwrite:
            more += 1
            path = folder / f"{numbered}-{more}{suffix}"
        paths.append(save(image, path))
    return paths


def _closing_line(result: Result, paths: list[Path]) -> str:
    where = str(paths[0]) if len(paths) == 1 else f"{paths[0]} … {paths[-1].name}"
    stages = ", ".join(f"{name} {m.seconds:.1f} s {shown(m.peak_bytes)}" for name, m in result.stages.items())
    return f"{where} · seed {result.request.seed} · {result.plan.summary()} · {stages} · peak {shown(result.peak_bytes)}"


def _report(result: Result, paths: list[Path]) -> dict[str, Any]:
    return {
        "request": asdict(result.request),
        "plan": result.plan.to_json(),
        "predicted": {"weight_bytes": result.plan.weight_bytes},
        "measured": {
            "seconds": result.seconds,
            "peak_bytes": result.peak_bytes,
            "stages": {name: asdict(stage) for name, stage in result.stages.items()},
        },
        "notices": list(result.notices),
        "image": str(paths[0]),
        "images": [str(path) for path in paths],
    }


def _fail(message: str) -> NoReturn:
    typer.echo(f"tightfit: {' '.join(message.split())}", err=True)
    sys.exit(2)


def main() -> None:
    """Entry point: exit code 0, 2 for bad input with one line on standard error, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path that the terminal's encoding lacks is no reason to fail
    # With one of two cores busy a picture took 1.1 s while OpenMP's threads spun and 0.5 s while they slept (docs/decisions.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = sys.argv[1:]
    if arguments and arguments[0] not in {"generate", "plan", "-h", "--help", "--version"}:
        arguments.insert(0, "generate")
    usage_error: Any = typer.BadParameter.__mro__[1]  # click's UsageError, which newer typers keep inside themselves
    try:
        code = app(arguments, standalone_mode=False)
    except TightfitError as error:
        _fail(str(error))
    except usage_error as error:
        message = error.format_message()
        _fail(f"{message}: put the prompt in quotes" if "extra argument" in message else message)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        typer.echo("tightfit: stopped", err=True)
    sys.exit(code if isinstance(code, int) else 0)
