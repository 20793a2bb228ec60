"""The command line: arguments become a Request, events become a progress bar and one closing line. No logic of its own."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NoReturn

import typer
from typer.core import TyperGroup

from ... import __version__
from .. import interrupts
from ..errors import OutOfMemoryError, TightfitError, first_line, out_of_memory, printable
from ..events import Event, Result
from ..files import cache_folder
from ..machine.hardware import Hardware
from ..machine.process import check_address_space
from ..models.schedulers import KINDS, SCHEDULERS
from ..placement import ATTENTIONS, BACKENDS, COMPUTES, PRECISIONS, RESIDENCIES, TILINGS
from ..planner.plan import Plan, Verdict
from ..planner.wishes import Wishes
from ..request import Request
from ..units import parse_bytes, shown
from .output import progress_bar, say, say_json, show_table, write
from .words import as_command, usage

if TYPE_CHECKING:
    from PIL import Image

    from ..infotext import Carried
    from ..pipeline import Pipeline


class Commands(TyperGroup):
    """The commands here, and those of rooms above, each imported when it is asked for."""

    others: ClassVar[Mapping[str, str]] = {}
    """Module of a typer app by the name of its command."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *self.others]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in self.others and cmd_name not in self.commands:
            command = typer.main.get_command(import_module(self.others[cmd_name]).app)
            command.name = cmd_name
            self.add_command(command, cmd_name)
        return super().get_command(ctx, cmd_name)


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Model = Annotated[str | None, typer.Option(help="emoji, a folder or a hub id.", metavar="MODEL")]
_Precision = Annotated[str | None, typer.Option(help=f"auto, {', '.join(PRECISIONS)}.", metavar="NAME")]
_Compute = Annotated[str, typer.Option(help=f"int8/int4: {', '.join(COMPUTES)}.", metavar="NAME", show_default=False)]
_Backend = Annotated[str, typer.Option(help=f"auto, {', '.join(BACKENDS)}.", metavar="NAME", show_default=False)]
_Provider = Annotated[str, typer.Option(help="Of onnx: cuda, dml, cpu …", metavar="NAME", show_default=False)]
_Device = Annotated[str, typer.Option(help="auto, cuda, xpu, mps, cpu.", metavar="NAME", show_default=False)]
_Budget = Annotated[str | None, typer.Option("--vram", "--ram", help="Keep to it: 4GiB.", metavar="BYTES")]
_Residency = Annotated[str, typer.Option(help=f"auto, {', '.join(RESIDENCIES)}.", metavar="NAME", show_default=False)]
_Attention = Annotated[str, typer.Option(help=f"auto, {', '.join(ATTENTIONS)}.", metavar="NAME", show_default=False)]
_Tiling = Annotated[str, typer.Option(help=f"VAE: auto, {', '.join(TILINGS)}.", metavar="NAME", show_default=False)]
_MinPsnr = Annotated[float | None, typer.Option(help="Least dB against fp32.", metavar="DB")]


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
    prompt_file: Annotated[Path | None, typer.Option(help="Prompt from a file.", metavar="FILE", readable=False)] = None,
    source: Annotated[Path | None, typer.Option("--from", help="Repeat that picture.", metavar="PNG", readable=False)] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to paint.", metavar="TEXT")] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option("--num-inference-steps", "--steps", help="Default 20; 4 for LCM.", metavar="N")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: model's.", metavar="X")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; default: model's.", metavar="N")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; default: model's.", metavar="N")] = None,
    seed: Annotated[int | None, typer.Option(help="Default, and -1: random.", metavar="N")] = None,
    scheduler: Annotated[str | None, typer.Option(help=f"{', '.join(sorted(SCHEDULERS, key=len))}.", metavar="NAME")] = None,
    num_images: Annotated[int | None, typer.Option(help="From seed, seed + 1 …", metavar="N")] = None,
    model: _Model = None,
    precision: _Precision = None,
    compute: _Compute = "auto",
    backend: _Backend = "auto",
    provider: _Provider = "auto",
    device: _Device = "auto",
    vram: _Budget = None,
    residency: _Residency = "auto",
    attention: _Attention = "auto",
    tiling: _Tiling = "auto",
    min_psnr: _MinPsnr = None,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Run by a saved plan.", metavar="FILE", readable=False)] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="PNG file or folder.", metavar="PATH", readable=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace, do not number.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Paint a picture from a prompt."""
    check_address_space()  # numpy's library ends the process where it has no room
    from ..pipeline import load

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
    saver = _Saver(*_target(output, request.prompt, request.num_images), request.num_images, overwrite)
    if source and model is None and carried.model is None:
        raise TightfitError(f"{source} does not say where its model is: name it with --model")
    fetch = source is None or model is not None  # a picture alone never starts a download
    chosen = {
        "compute": compute,
        "backend": backend,
        "provider": provider,
        "residency": residency,
        "attention": attention,
        "tiling": tiling,
        "min_psnr": min_psnr,
    }
    other = model is not None and carried.model is not None and carried.model not in (model, str(Path(model).absolute()))
    if other and carried.precision and not precision:
        say(f"note: {source} was painted in {carried.precision}, by another model: --precision says if in that", err=True)
    wishes = _wishes(precision or (None if other else carried.precision), vram, chosen)
    plan = Plan.read(plan_file) if plan_file else None
    where = next(name for name in (model, carried.model, plan.model if plan else "emoji") if name is not None)
    with load(where, device=device, plan=plan, local_files_only=not fetch, **wishes) as pipeline:
        for note in pipeline.hardware.passed_over:
            say(f"note: {note}", err=True)
        try:
            result = _run(pipeline, request, saver)
        except BaseException:
            saver.tell()
            raise
    if as_json:
        say_json(_report(result, saver.paths))
    else:
        say(_closing_line(result, saver.paths))


@app.command("plan")
def show_plan(
    model: _Model = "emoji",
    width: Annotated[int | None, typer.Option(help="Pixels; default: model's.", metavar="N")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; default: model's.", metavar="N")] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option("--num-inference-steps", "--steps", help="Default 20; 4 for LCM.", metavar="N")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: model's.", metavar="X")] = None,
    hardware: Annotated[str | None, typer.Option(help="A card that is not here: rtx-2060.", metavar="NAME")] = None,
    device: _Device = "auto",
    vram: _Budget = None,
    precision: _Precision = None,
    compute: _Compute = "auto",
    backend: _Backend = "auto",
    provider: _Provider = "auto",
    residency: _Residency = "auto",
    attention: _Attention = "auto",
    tiling: _Tiling = "auto",
    min_psnr: _MinPsnr = None,
    every: Annotated[bool, typer.Option("--all", help="Also what others beat in all respects.")] = False,
    save: Annotated[Path | None, typer.Option(help="Write the chosen plan.", metavar="FILE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every candidate as JSON.")] = False,
) -> None:
    """Say what each way of running a model would take here, or on a card of profiles/, and which is best; no weight is read."""
    from ..machine.profiles import profile
    from ..models.hub import inspect
    from ..planner import choose as planner

    if hardware and device != "auto":
        raise TightfitError("--hardware names a machine that is not here, --device a part of this one: give one of them")
    machine = profile(hardware) if hardware else Hardware.detect(device)
    chosen = {
        "compute": compute,
        "backend": backend,
        "provider": provider,
        "residency": residency,
        "attention": attention,
        "tiling": tiling,
        "min_psnr": min_psnr,
    }
    wishes = Wishes(**_wishes(precision, vram, chosen))
    spec = inspect("emoji" if model is None else model)
    own = spec.scheduler.get("_class_name") in KINDS  # others paint with a --scheduler, most of which call the U-Net once a step
    sampler = None if own else "euler"
    request = Request("a", None, width, height, num_inference_steps, guidance_scale, scheduler=sampler).resolve(spec)
    planner.refuse_hopeless(machine, spec, request, wishes)
    plans = planner.plan(machine, spec, request, wishes)
    if as_json:
        notes = _plan_notes(plans[0], machine)
        say_json({"request": _sized(request), "notes": notes, "plans": [each.to_json() for each in plans]})
    else:
        _print_plans(plans, machine, request, every)
    if not plans[0].fits:
        raise planner.none_fits(plans, machine, spec, request, wishes)
    if save:
        write(save, json.dumps(plans[0].to_json(), indent=1, ensure_ascii=False))


@app.command()
def info(device: _Device = "auto") -> None:
    """Say what this machine is, what is free on it now, and what could not be found out."""
    from ..machine.providers import providers

    found = Hardware.detect(device)
    capability = ", capability {}.{}".format(*found.capability) if found.capability else ""
    rows = [f"{found.name} ({found.device}{capability})"]
    beside = [f"{shown(found.context_bytes)} of it for the process itself"] if found.context_bytes else []
    if found.device != "cpu":
        beside = [f"{shown(found.host_bytes)} free in the host"] if found.host_bytes else []
    rows.append("; ".join([f"memory: {shown(found.free_bytes)} free of {shown(found.total_bytes)}", *beside]))
    rates = ", ".join(f"{precision} {found.rate(precision) / 1e12:.2f}" for precision in found.precisions)
    rows.append(
        f"computes in: {rates} TFLOP/s, {found.bandwidth / 1e9:.0f} GB/s ({'measured here' if found.calibrated else 'estimated'})"
    )
    rows.append(f"ONNX Runtime: {', '.join(providers()) or 'not installed'}")
    for row in (*rows, *(f"note: {note}" for note in found.notes)):
        say(row)


@app.command()
def calibrate(device: _Device = "auto") -> None:
    """Measure this machine once (half a minute), so that predicted seconds are its own."""
    from ..backends.torch import calibration

    hardware = Hardware.detect(device)
    interrupts.tidily()
    found = calibration.calibrate(hardware)
    rates = ", ".join(f"{precision} {rate / 1e12:.3f}" for precision, rate in found["rates"].items())
    attention = ", ".join(f"{kind} {rate / 1e12:.3f}" for kind, rate in found["attention_rates"].items())
    say(f"TFLOP/s: {rates}; attention: {attention}")
    speeds = ", ".join(f"{name} {found[name] / 1e9:.1f}" for name in ("bandwidth", "bus", "read"))
    starts = ", ".join(f"{kind} {seconds * 1e6:.0f}" for kind, seconds in found["starts"].items())
    say(f"GB/s: {speeds}; µs to start an operator: {starts}, others {found['call_seconds'] * 1e6:.1f}")
    say(f"kept in {calibration.save(hardware, found)}")


def _wishes(precision: str | None, budget: str | None, chosen: dict[str, Any]) -> dict[str, Any]:
    """Fields of Wishes. One run of the command needs each component once, so loading is counted for each."""
    room = None if budget is None else parse_bytes(budget, "--vram or --ram")
    fields = chosen | {"precision": precision or "auto", "budget": room, "requests": 1}
    Wishes(**fields)  # raises here, before what takes time is imported
    return fields


_WIDE = 130  # columns of a terminal that has room for the table


def _print_plans(plans: list[Plan], machine: Hardware, request: Request, every: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    first = plans[0]
    title = f"{first.model}, {request.width}x{request.height}, {request.num_inference_steps} steps, on {machine.name}"
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("precision", "residency", "CFG", "attention", "VAE"):
        table.add_column(column, no_wrap=True)
    for column in ("encode", "denoise", "decode", "seconds", "dB"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", min_width=24)
    kept = plans if every else [p for p in plans if p.chosen or not any(q.beats(p) for q in plans)]
    rows: dict[tuple[str, ...], Plan] = {}
    for p in kept:  # some differ in what no column says
        rows.setdefault((*_cells(p), "" if p.fits else p.reason), p)
    reasons, explained = _short_reasons(list(rows.values()))
    lines = []
    for (*cells, _), p in rows.items():
        reason = f"✓ {p.reason}" if p.chosen else reasons.get(p.reason, p.reason)
        table.add_row(*cells, printable(reason), style="bold" if p.chosen else None if p.fits else "dim")
        stages = ", ".join(f"{name} {shown(count)}" for name, count in p.predicted.stages.items())
        what = f"{p.summary()}: {stages}, {p.predicted.seconds:.1f} s, {p.predicted.psnr:.0f} dB"
        lines.append(((what, reason), "bold" if p.chosen else None))
    show_table(title, table, lines, _WIDE)
    notes = [*explained]
    if hidden := len(plans) - len(kept):
        notes.append(f"{hidden} more candidates are refused, or beaten in memory, seconds and quality alike: --all lists them")
    if same := len(kept) - len(rows):
        notes.append(f"{same} more are the same in all that is shown here: --json lists them")
    of_memory, *others = _plan_notes(first, machine)
    for note in (of_memory, *notes, *others):
        say(f"• {note}")


def _cells(p: Plan) -> list[str]:
    """What the columns of the table say of a plan, but for the reason."""
    unet, vae = p.placements["unet"], p.placements["vae_decoder"]
    precision = unet.precision if unet.compute == vae.compute else f"{unet.precision}, VAE {vae.compute}"
    precision += ("" if unet.backend == "torch" else f", {unet.backend}") + p.elsewhere
    stages = [shown(count) for count in p.predicted.stages.values()]
    figures = f"{p.predicted.seconds:.1f}", f"{p.predicted.psnr:.0f}"
    return [precision, p.residency, p.cfg, unet.attention, vae.tiling, *stages, *figures]


def _short_reasons(plans: list[Plan]) -> tuple[dict[str, str], list[str]]:
    """What stands for a refusal that several rows have, and a line that says it once. Lack of memory differs from row to row."""
    count = Counter(p.reason for p in plans if p.verdict in (Verdict.REFUSED, Verdict.TOO_COARSE))
    often = [reason for reason, rows in count.items() if rows > 1]
    short = {reason: f"refused{f' ({i + 1})' if len(often) > 1 else ''}" for i, reason in enumerate(often)}
    causes = {p.reason: p.cause for p in plans}
    return short, [f"{short[reason]}: {causes[reason]}" for reason in often]


def _plan_notes(plan: Plan, machine: Hardware) -> list[str]:
    """What a plan has to fit in, and what is known of the machine."""
    room = f"{shown(plan.budget_bytes)} to fit in"
    if context := plan.predicted.context_bytes:
        holder = "the process itself" if plan.device == "cpu" else "the device's context"
        room += f", {shown(context)} of it for {holder}"
    return [room, *machine.notes]


def _sized(request: Request) -> dict[str, Any]:
    """What of a request memory and seconds depend on."""
    names = ("width", "height", "num_images", "num_inference_steps", "guidance_scale", "scheduler")
    return {name: getattr(request, name) for name in names}


_MOST_TEXT = 2**20  # bytes of a prompt: a text encoder reads some hundred, and what a pipe or a device holds may have no end


def _prompt(prompt: str | None, file: Path | None) -> str | None:
    if prompt is not None and file is not None:
        raise TightfitError("give the prompt as an argument or with --prompt-file, not both")
    if prompt != "-" and file is None:
        return prompt
    where = file or "standard input"
    try:
        if file is None:
            data = _standard_input()
        else:
            with file.open("rb") as stream:
                data = stream.read(_MOST_TEXT + 1)
        if len(data) > _MOST_TEXT:
            raise TightfitError(f"{where} has more than {shown(_MOST_TEXT)}: no prompt is so long")
        return _text(data).strip()
    except UnicodeDecodeError:
        raise TightfitError(f"{where} is not UTF-8 text") from None
    except OSError as error:
        raise TightfitError(f"{where} cannot be read: {error.strerror}") from None


def _standard_input() -> bytes:
    if sys.stdin is None:
        return b""
    stream = getattr(sys.stdin, "buffer", None)
    return stream.read(_MOST_TEXT + 1) if stream else sys.stdin.read(_MOST_TEXT + 1).encode()


def _text(data: bytes) -> str:
    """Text as editors and shells write it: UTF-8, or UTF-16 with its mark, as PowerShell 5 writes files. The mark is dropped."""
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if wide else "utf-8").lstrip("\ufeff")  # PowerShell marks what it pipes, at times twice


def _carried(source: Path | None) -> Carried:
    """What the picture `source` asks for, nothing without one."""
    from ..infotext import Carried, read

    carried = read(source) if source else Carried({})
    for notice in carried.notices:
        say(f"note: {notice}", err=True)
    return carried


def _target(output: Path | None, prompt: str, num_images: int) -> tuple[Path, str]:
    """Folder and file name to write to, checked before anything is computed."""
    words = "-".join(re.findall(r"\w+", prompt.lower())).encode()[:60].decode(errors="ignore").strip("-")
    folder, name = output or Path(), f"{words or 'picture'}.png"
    try:
        if output is not None and output.suffix and not output.is_dir():
            if output.suffix.lower() != ".png":
                raise TightfitError(f"--output {output} is no .png, as which pictures are written: name a .png, or a folder")
            folder, name = output.parent, output.name
        there = next(each for each in (folder, *folder.parents) if each.exists())  # the rest is made for the first picture
        with suppress(FileNotFoundError):
            (there / f"{num_images}-{name}").lstat()  # too long a name for the file system fails here, not after the work
        TemporaryFile(dir=there).close()
    except OSError as error:
        raise TightfitError(
            f"nothing can be written to {output or name} ({error.strerror}): name another place with --output"
        ) from None
    return folder, name


def _run(pipeline: Pipeline, request: Request, save: Callable[[Image.Image, int], object]) -> Result:
    """Run to the end, each picture saved as soon as it is decoded. Ctrl-C ends it after those that are painted, twice at once."""
    interrupts.tidily()
    with progress_bar(8) as bar:
        task, events, result = bar.add_task("loading", total=1), pipeline.run(request), None
        advance: Callable[[], Event] = lambda: next(events)  # noqa: E731
        interrupted, unsaved = False, None
        while result is None:
            try:
                event = advance()
                unsaved = event if event.picture else None
                for notice in event.notices:
                    bar.console.print(printable(f"note: {notice}"), markup=False, emoji=False, soft_wrap=True)
                bar.update(task, description=event.stage, completed=event.step, total=event.steps)
                unsaved = _save(unsaved, save)
                result, advance = event.result, lambda: next(events)
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted, advance = True, lambda: events.throw(KeyboardInterrupt())
                unsaved = _save(unsaved, save)
    return result


def _save(event: Event | None, save: Callable[[Image.Image, int], object]) -> None:
    if event and event.picture:
        save(event.picture, event.image)


class _Saver:
    """Writes pictures as they come, and never over a file that is there, unless told to."""

    def __init__(self, folder: Path, name: str, count: int, overwrite: bool) -> None:
        self.paths: list[Path] = []
        self._folder, self._name, self._count, self._overwrite = folder, Path(name), count, overwrite

    def __call__(self, image: Image.Image, index: int) -> None:
        from ..png import save

        numbered = f"{self._name.stem}-{index + 1}{self._name.suffix}" if self._count > 1 else self._name.name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TightfitError(f"the folder {self._folder} cannot be made ({error.strerror}): name another place") from None
        path = save(image, self._folder / numbered, self._overwrite)
        if path.name != numbered:
            say(f"note: {self._folder / numbered} is there, so this is {path.name}: --overwrite replaces files", err=True)
        self.paths.append(path)

    def tell(self) -> None:
        """What there is of a request that did not end."""
        if self.paths:
            some = f"{self.paths[0]} … {self.paths[-1].name}" if len(self.paths) > 1 else f"{self.paths[0]}"
            say(f"note: {len(self.paths)} of {self._count} pictures are saved: {some}", err=True)


def _closing_line(result: Result, paths: list[Path]) -> str:
    where = str(paths[0]) if len(paths) == 1 else f"{paths[0]} … {paths[-1].name}"
    stages = ", ".join(f"{name} {m.seconds:.1f} s {shown(m.peak_bytes)}" for name, m in result.stages.items())
    peak = f"peak {shown(result.peak_bytes)} of {shown(result.plan.predicted.peak_bytes)} predicted"
    return (
        f"{where} · seed {result.request.seed} · {result.plan.summary()} · {stages} · {peak}, process {shown(result.process_bytes)}"
    )


def _report(result: Result, paths: list[Path]) -> dict[str, Any]:
    return {
        "request": asdict(result.request),
        "plan": result.plan.to_json(),
        "predicted": asdict(result.plan.predicted),
        "measured": {
            "peak_bytes": result.peak_bytes,
            "stages": {name: stage.peak_bytes for name, stage in result.stages.items()},
            "seconds": result.seconds,
            "process_bytes": result.process_bytes,
            "details": {name: asdict(stage) for name, stage in result.stages.items()},
        },
        "notices": list(result.notices),
        "image": str(paths[0]),
        "images": [str(path) for path in paths],
    }


_LONGEST = 2000  # characters of an error; what a file says may have millions


def _fail(message: str) -> NoReturn:
    line = " ".join(message.split())
    say(f"tightfit: {line if len(line) <= _LONGEST else f'{line[:_LONGEST]} …'}", err=True)
    sys.exit(2)


def _no_memory(error: Exception) -> str:
    return f"out of memory ({first_line(error)}): close what else uses the memory, or paint a smaller picture"


def _stop(number: int, _: Any) -> None:
    sys.exit(128 + number)


def main() -> None:
    """Entry point: exit code 0, 2 for bad input with one line on standard error, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path that the terminal's encoding lacks is no reason to fail
    # With one of two cores busy a picture took 1.1 s while OpenMP's threads spun and 0.5 s while they slept (docs/decisions.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # 0.36 tells of Optimum's two packages, and that there is no CUDA
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of configs in its own words
    if os.path.expanduser("~") == "~":  # noqa: PTH111  no HOME and no such user: the hub's library would make a folder called ~
        os.environ.setdefault("HF_HOME", str(cache_folder().parent / "huggingface"))
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", "CUDA is not available or torch_xla is imported")
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # of a config that no model fits, as is said then
    for name in ("SIGTERM", "SIGHUP"):  # so that what was half written goes
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _stop)
    usage_error: Any = typer.BadParameter.__mro__[1]  # click's UsageError, which newer typers keep inside themselves
    try:
        code = app(as_command(sys.argv[1:]), standalone_mode=False)
    except TightfitError as error:
        _fail(_no_memory(error) if isinstance(error, OutOfMemoryError) and not error.complete else str(error))
    except usage_error as error:
        _fail(usage(error))
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if not out_of_memory(error):
            raise
        _fail(_no_memory(error))
    if code == 130:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what was begun is tidied up already; leaving takes a moment
        typer.echo("tightfit: stopped", err=True)
    sys.exit(code if isinstance(code, int) else 0)
