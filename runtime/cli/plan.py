"""`tightfit plan`: every way to run a model, as a table with reasons or as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..adapters import written
from ..asking import check_taken
from ..conditions import asked as conditions_of
from ..errors import printable
from ..fields import described
from ..machine.hardware import Hardware
from ..models.cures import exporting
from ..models.schedulers import KINDS
from ..passes import mixed, passes, wishes_after
from ..placement import STAGES
from ..planner.plan import Plan, Verdict
from ..planner.wishes import Wishes
from ..request import Job, Request
from ..texts import TEXTS
from ..units import shown
from .options import (
    ADAPTERS_IN_ORDER,
    ASKING_IN_ORDER,
    HARDWARE,
    MODEL,
    NO_TEXT_CACHE,
    SECOND_PASS,
    Adapting,
    Asking,
    Device,
    ModelsDirs,
    machine_of,
    taking,
    wishes,
    with_paths,
)
from .output import TEXT, say, say_json, show_table, write

_NONE = "–"


@dataclass(frozen=True)
class Options:
    """Options of `plan` besides those of Request and Wishes."""

    prompt: Annotated[str | None, typer.Option(help="Of that text.", metavar="TEXT")] = None
    no_text_cache: Annotated[bool, NO_TEXT_CACHE] = False
    model: Annotated[str, MODEL] = "emoji"
    models_dirs: ModelsDirs = None
    hardware: Annotated[str | None, HARDWARE] = None
    device: Device = "auto"
    every: Annotated[bool, typer.Option("--all", help="Also what others beat.")] = False
    save: Annotated[Path | None, typer.Option(help="Write the chosen plan.", metavar="FILE")] = None
    as_json: Annotated[bool, typer.Option("--json", help="Every one, as JSON.")] = False


_ORDER = f"""
model models_dirs prompt negative_prompt {ADAPTERS_IN_ORDER} {ASKING_IN_ORDER}
width height num_inference_steps step_cache guidance_scale skip_guidance_layers
skip_layer_guidance_start skip_layer_guidance_stop {SECOND_PASS} hardware
device budget precision compute backend provider residency attention tiling prefer min_psnr compile
cuda_graphs
no_text_cache every save as_json
"""


@taking(Options, Adapting, Asking, Request, Wishes, order=_ORDER)
def show_plan(
    options: Options,
    adapting: Mapping[str, Any],
    asking: Mapping[str, Any],
    asked: Mapping[str, Any],
    wished: Mapping[str, Any],
) -> None:
    """Say what each way of running a model would take here, or on a card of profiles/, and which is best; no
    weight is read."""
    from ..models.hub import inspect, located
    from ..planner import choose as planner

    machine = machine_of(options.device, options.hardware)
    wanted = Wishes(**wishes(wished))
    models_dirs = options.models_dirs or ()
    spec = inspect(located(options.model, models_dirs))
    # Others paint with a --scheduler, most of which call the U-Net once a step.
    sampler = None if spec.scheduler.get("_class_name") in KINDS else "euler"
    check_taken(lambda: spec, {**adapting, **asking})
    adapters, asked = written(adapting, models_dirs), with_paths(asked, models_dirs)
    conditions = conditions_of({**asking, "models_dirs": models_dirs})
    # What is said of no text is of none that is known.
    TEXTS.keep(options.prompt is not None and not options.no_text_cache)
    texts = {"prompt": "a", **asked}
    wish = Request(**texts, scheduler=sampler, adapters=adapters, conditions=conditions)
    planned = _planned(machine, wish.resolve(spec), wanted)
    (job, plans), *_ = planned
    of_model = list(dict.fromkeys(note for one, ways in planned for note in _of_model(one, ways[0])))
    if options.as_json:
        _print_json(planned, [*_notes(plans[0], machine), *of_model])
    else:
        for one, ways in planned:
            print_plans(ways, machine, one, options.every)
            print_choices(ways)
        for note in (*_of_passes(planned), *_of_adapters(job), *of_model):
            say(f"• {note}")
    for one, ways in planned:
        if not ways[0].fits:
            raise planner.none_fits(ways, machine, one, wanted)
    if options.save:
        write(options.save, json.dumps(plans[0].to_json(), indent=1, ensure_ascii=False))


Planned = Sequence[tuple[Job, list[Plan]]]
"""Each pass of a request, with every way to run it."""


def _planned(machine: Hardware, whole: Job, wanted: Wishes) -> Planned:
    from ..planner import choose as planner

    planned: list[tuple[Job, list[Plan]]] = []
    for job in passes(whole):
        wishes = wishes_after(planned[0][0], planned[0][1][0], job, wanted) if planned else wanted
        planner.refuse_hopeless(machine, job, wishes)
        planned.append((job, planner.plan(machine, job.model, job, wishes)))
    return planned


def _of_model(job: Job, plan: Plan) -> list[str]:
    from ..planner.estimate import encodings

    added = [part for name, part in job.spec.components.items() if name not in job.model.components]
    beside = [
        f"with the {part.name} in {part.folder}, {shown(part.stored_bytes)} of weights" for part in added
    ]
    return [*beside, *_of_texts(job, plan), *encodings(job.spec, plan.placements), *job.spec.notes]


def _of_texts(job: Job, plan: Plan) -> list[str]:
    """Why there is no text encoder in the plan."""
    if not plan.texts_known:
        return []
    count = len(job.prompting.texts)
    said = {1: "the text is", 2: "both texts are"}.get(count, f"all {count} texts are")
    return [f"{said} in the text cache: no text encoder is needed"]


def _of_adapters(job: Job) -> list[str]:
    return [f"with --{given.option.replace('_', '-')} {given.name}" for given in job.adapters]


def _of_passes(planned: Planned) -> list[str]:
    """What several passes take together, by the plans that are chosen."""
    if len(planned) == 1:
        return []
    (_, (first, *_)), (_, (second, *_)) = planned
    chosen = first.predicted, second.predicted
    seconds, peak_bytes = sum(p.seconds for p in chosen), max(p.peak_bytes for p in chosen)
    peaks = ", then ".join(shown(p.peak_bytes) for p in chosen)
    return [f"both passes: {seconds:.1f} s, peak {shown(peak_bytes)} ({peaks})", *mixed(first, second)]


def _print_json(planned: Planned, notes: list[str]) -> None:
    """The first pass, and those that follow, if any."""
    (first, plans), *others = (
        (_sized(job) | job.adapters_json(), [plan.to_json() for plan in plans]) for job, plans in planned
    )
    then = [{"request": request, "plans": ways} for request, ways in others]
    more = {"then": then} if then else {}
    say_json({"request": first, "notes": notes, "plans": plans, **more})


def print_plans(plans: list[Plan], machine: Hardware, request: Job, every: bool) -> None:
    """A table of the plans, without `every` only those that none beats, then notes below it."""
    first = plans[0]
    steps = request.num_inference_steps if request.whole is request else request.steps_taken
    size = f"{request.width}x{request.height}, {steps} steps"
    kept = plans if every else [p for p in plans if p.chosen or not any(q.beats(p) for q in plans)]
    rows: dict[tuple[str, ...], Plan] = {}
    for plan in kept:  # some differ in what no column says
        rows.setdefault((*_cells(plan), "" if plan.fits else plan.reason), plan)
    reasons, explained = _short_reasons(list(rows.values()))
    _print_table(f"{first.model}, {size}, on {machine.name}", rows, reasons)
    notes = [*explained]
    if hidden := len(plans) - len(kept):
        beaten = "are refused, or beaten in memory, seconds and quality alike"
        notes.append(f"{hidden} more candidates {beaten}: --all lists them")
    if same := len(kept) - len(rows):
        notes.append(f"{same} more are the same in all that is shown here: --json lists them")
    of_memory, of_seconds, *others = _notes(first, machine)
    for note in (of_memory, of_seconds, *notes, *others):
        say(f"• {note}")


def _print_table(title: str, rows: Mapping[tuple[str, ...], Plan], reasons: Mapping[str, str]) -> None:
    """The plans by their cells, each with its reason or what is short for it; where there is less room,
    in lines beside the figures."""
    wide, narrow = _tables()
    for (*cells, _), plan in rows.items():
        reason = f"✓ {plan.reason}" if plan.chosen else reasons.get(plan.reason, plan.reason)
        style = "bold" if plan.chosen else None if plan.fits else "dim"
        wide.add_row(*cells, printable(reason), style=style)
        *how, encode, denoise, decode, seconds, psnr = cells
        words = ", ".join(_in_words(how))
        why = f"{words}:\n{printable(reason)}"
        narrow.add_row(seconds, encode, denoise, decode, psnr, why, style=style)
    show_table(title, wide, narrow)


def print_choices(plans: Sequence[Plan]) -> None:
    """What cached steps save in seconds and cost in dB: for each arithmetic and count the fastest that fits,
    beside the fastest of all with all steps in full. Nothing where no plan has cached steps."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    fastest: dict[tuple[str, int], Plan] = {}
    for plan in sorted((p for p in plans if p.fits), key=lambda p: p.predicted.seconds):
        fastest.setdefault((plan.denoiser.arithmetic, plan.step_cache), plan)
    full = [p.predicted for p in fastest.values() if p.step_cache == 1]
    if not full or len(full) == len(fastest):
        return
    table, lines = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0)), []
    table.add_column("choice")
    for column in ("seconds", "saves", "times as fast", "dB to fp32"):
        table.add_column(column, justify="right", no_wrap=True)
    for (arithmetic, _), plan in sorted(fastest.items()):
        said, style = f"{arithmetic}{plan.cached or ', all in full'}", "bold" if plan.chosen else None
        seconds = plan.predicted.seconds
        saved = round(full[0].seconds - seconds, 1)
        saves = f"{saved:.1f} s" if saved > 0 else ""
        times, decibels = f"{full[0].seconds / seconds:.2f}", f"{plan.predicted.psnr:.0f}"
        table.add_row(said, f"{seconds:.1f}", saves, times, decibels, style=style)
        gain = f", saves {saves}" if saves else ""
        lines.append(((f"{said}: {seconds:.1f} s{gain}, {decibels} dB",), style))
    show_table("What cached steps save and cost, each the fastest of its kind that fits", table, lines)


_HOW = ("precision", "residency", "CFG", "attention", "VAE")


def _tables() -> tuple[Any, Any]:
    """Two empty ones: with a column for each choice, and with one for all."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    wide, narrow = (Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0)) for _ in range(2))
    for column in _HOW:
        wide.add_column(column, no_wrap=True)
    for table, figures in ((wide, (*STAGES, "seconds", "dB")), (narrow, ("seconds", *STAGES, "dB"))):
        for column in figures:
            table.add_column(column, justify="right", no_wrap=True)
    wide.add_column("", max_width=TEXT)
    narrow.add_column("how it runs")
    return wide, narrow


def _in_words(how: Sequence[str]) -> list[str]:
    """What _HOW says of a plan, where no column does."""
    precision, residency, cfg, attention, vae = how
    guidance = [] if cfg == _NONE else [f"{cfg} CFG"]
    return [precision, residency, *guidance, attention, f"VAE {vae}"]


def _cells(p: Plan) -> list[str]:
    """What the columns of the table say of a plan, but for the reason."""
    unet, vae = p.denoiser, p.decoder
    precision = unet.precision if unet.compute == vae.compute else f"{unet.precision}, VAE {vae.compute}"
    precision += ("" if unet.backend == "torch" else f", {unet.backend}") + p.elsewhere
    faster = {"packed": unet.packed, "compiled": unet.compiled, "graphs": unet.captured}
    precision += "".join(f", {how}" for how, is_so in faster.items() if is_so)
    precision += f", 1 of {p.step_cache}" if p.step_cache > 1 else ""  # what of, its reason says
    stages = [_cell(count) for count in p.predicted.stages.values()]
    figures = f"{p.predicted.seconds:.1f}", f"{p.predicted.psnr:.0f}"
    return [
        precision,
        p.residency,
        p.cfg if p.guided else _NONE,
        unet.attention,
        vae.tiling,
        *stages,
        *figures,
    ]


def _cell(count: int) -> str:
    """Of a stage, which a pass may not have."""
    return shown(count) if count else _NONE


def _short_reasons(plans: list[Plan]) -> tuple[dict[str, str], list[str]]:
    """What stands for a refusal that several rows have, and a line that says it once.

    Lack of memory differs from row to row.
    """
    count = Counter(p.reason for p in plans if p.verdict in (Verdict.REFUSED, Verdict.TOO_COARSE))
    often = [reason for reason, rows in count.items() if rows > 1]
    short = {reason: f"refused{f' ({i + 1})' if len(often) > 1 else ''}" for i, reason in enumerate(often)}
    causes = {p.reason: p.cause for p in plans}
    return short, [f"{short[reason]}: {causes[reason]}" for reason in often]


def _notes(plan: Plan, machine: Hardware) -> list[str]:
    """What a plan has to fit in, what its seconds are of, and what is known of the machine."""
    room = f"{shown(plan.budget_bytes)} to fit in"
    if context := plan.predicted.context_bytes:
        holder = "the process itself" if plan.device == "cpu" else "the device's context"
        room += f", {shown(context)} of it for {holder}"
    return [room, _of_seconds(plan), *machine.notes]


def _of_seconds(plan: Plan) -> str:
    predicted, precision = plan.predicted, plan.precision
    parts = {
        "to read the weights": predicted.reading_seconds,
        f"to quantise them to {precision}": predicted.quantising_seconds,
        "to compile blocks, once": predicted.compiling_seconds,
        "to paint": predicted.painting_seconds,
    }
    shares = tenths(predicted.seconds, [*parts.values()])
    said = ", ".join(f"{share:.1f} {what}" for what, share in zip(parts, shares, strict=True) if share)
    said = f"{predicted.seconds:.1f} s{': ' if said else ''}{said}"
    if predicted.quantising_seconds <= predicted.seconds / 2:
        return said
    return f"{said}; {exporting(plan.model, precision.partition('-')[0])} quantises them once"


def tenths(whole: float, parts: Sequence[float]) -> list[float]:
    """Parts in tenths that add up to the whole in tenths, where they are all of it: those that lose most by
    that are rounded up."""
    counts = [int(10 * part) for part in parts]
    more = round(10 * whole) - sum(counts)
    if not 0 <= more <= len(parts):
        return [round(part, 1) for part in parts]
    by_loss = sorted(range(len(parts)), key=lambda number: counts[number] - 10 * parts[number])
    return [(count + (number in by_loss[:more])) / 10 for number, count in enumerate(counts)]


def _sized(request: Request) -> dict[str, Any]:
    """What of a request memory and seconds depend on."""
    return {name: getattr(request, name) for name, known in described(Request).items() if known.costs}
