"""`tightfit generate`: arguments become a Request, events become a progress bar and one closing line."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import interrupts, lean
from ..adapters import written
from ..adapters.prompt import WORD, from_words
from ..asking import check_taken, untaken
from ..conditions import asked as conditions_of
from ..conditions.controlnet import CONTROL, again
from ..conditions.reference import OPTION as REFERENCE
from ..conditions.reference import check_carried
from ..errors import TightfitError, printable
from ..events import Event, Result, joined
from ..machine.process import check_address_space
from ..models.hub import inspect, located
from ..models.samplers.names import AUTOMATIC, schedule_of, split
from ..pictures import METADATA
from ..planner.plan import Plan
from ..planner.wishes import Wishes
from ..request import Request, of_others
from ..settings import idle
from ..texts import TEXTS
from ..units import shown
from ..wildcards import variants
from .options import (
    ADAPTERS_IN_ORDER,
    ASKING_IN_ORDER,
    MODEL,
    NO_TEXT_CACHE,
    WILDCARDS,
    Adapting,
    Asking,
    Device,
    ModelsDirs,
    as_typed,
    taking,
    wishes,
    with_paths,
)
from .output import progress_bar, say, say_json
from .prompt import read_prompt
from .saving import FORMATS, Saver, Writing, target

if TYPE_CHECKING:
    from PIL import Image

    from ..infotext import Carried
    from ..models.spec import ModelSpec
    from ..pipeline import Pipeline

_Prompt = typer.Argument(help="What to paint; - reads standard input.", show_default=False)
_PromptFile = typer.Option(help="Prompt from a file.", metavar="FILE", readable=False)
_Source = typer.Option("--from", help="Repeat that picture.", metavar="FILE", readable=False)
_PlanFile = typer.Option(
    "--plan", help="Run by a saved plan.", metavar="FILE", readable=False, rich_help_panel="Machine"
)
_Connect = typer.Option(help="Paint at a tightfit serve.", metavar="URL", rich_help_panel="Machine")
_PANEL = "Output"
_Output = typer.Option(
    "-o",
    "--output",
    help=r"File or folder: out/\[date]/\[seed].png.",
    metavar="PATH",
    readable=False,
    rich_help_panel=_PANEL,
)
_Overwrite = typer.Option("--overwrite", help="Replace, do not number.", rich_help_panel=_PANEL)
_Format = typer.Option(help=f"{', '.join(FORMATS)}.", metavar="NAME", rich_help_panel=_PANEL)
_Quality = typer.Option(help="Of JPEG and WebP, 1 to 100; default 90.", metavar="N", rich_help_panel=_PANEL)
_Metadata = typer.Option(help="Text inside: full, a1111, none.", metavar="NAME", rich_help_panel=_PANEL)
_Grid = typer.Option("--grid", help="Also all on one sheet.", rich_help_panel=_PANEL)
_Json = typer.Option("--json", help="Print one JSON object.", rich_help_panel=_PANEL)


@dataclass(frozen=True)
class Options:
    """Options of `generate` besides those of Request and Wishes."""

    prompt: Annotated[str | None, _Prompt] = None
    prompt_file: Annotated[Path | None, _PromptFile] = None
    source: Annotated[Path | None, _Source] = None
    model: Annotated[str | None, MODEL] = None
    models_dirs: ModelsDirs = None
    device: Device = "auto"
    plan_file: Annotated[Path | None, _PlanFile] = None
    connect: Annotated[str | None, _Connect] = None
    no_text_cache: Annotated[bool, NO_TEXT_CACHE] = False
    output: Annotated[Path | None, _Output] = None
    wildcards: Annotated[Path | None, WILDCARDS] = None
    overwrite: Annotated[bool, _Overwrite] = False
    format: Annotated[str | None, _Format] = None
    quality: Annotated[int | None, _Quality] = None
    metadata: Annotated[str | None, _Metadata] = None
    grid: Annotated[bool, _Grid] = False
    as_json: Annotated[bool, _Json] = False

    @property
    def writing(self) -> Writing:
        """How the pictures are written. Raises TightfitError."""
        return Writing(
            self.format, self.quality, self.metadata or METADATA[0], self.overwrite, self.grid
        ).checked()


_ORDER = f"""
prompt prompt_file source
negative_prompt num_inference_steps guidance_scale width height seed scheduler num_images
{ASKING_IN_ORDER}
model models_dirs {ADAPTERS_IN_ORDER}
precision compute backend provider device budget residency attention tiling prefer min_psnr ...
plan_file connect no_text_cache output overwrite format quality metadata grid as_json
"""


@taking(Options, Adapting, Asking, Request, Wishes, order=_ORDER)
def generate(
    options: Options,
    adapting: Mapping[str, Any],
    asking: Mapping[str, Any],
    asked: Mapping[str, Any],
    wished: Mapping[str, Any],
) -> None:
    """Paint a picture from a prompt."""
    if options.connect is not None:
        _paint_there(options, {**adapting, **asking, **asked}, wished)
        return
    TEXTS.keep(not options.no_text_cache)
    check_address_space()  # numpy's library ends the process where it has no room
    from ..pipeline import load

    models_dirs = options.models_dirs or ()
    if options.model is not None:
        options = replace(options, model=located(options.model, models_dirs))
    prompt = read_prompt(options.prompt, options.prompt_file)
    carried = _carried(options, adapting)
    plan = Plan.read(options.plan_file) if options.plan_file else None
    model, offline = _model(options, carried, plan)
    read = cache(partial(inspect, model, local_files_only=offline))
    check_taken(read, {**adapting, **asking})
    carried = _taken(carried, read)
    said = carried.request.get("prompt") if prompt is None else prompt
    for note in check_carried(carried.asking.get(REFERENCE, ()), asking.get(REFERENCE, ()), options.source):
        say(f"note: {note}", err=True)
    if carried.asking.keys() - {CONTROL, REFERENCE} and "image" not in asking:
        painted = f"{options.source} was painted over another picture, which it does not carry"
        raise TightfitError(f"{painted}: give that by --image, and a mask by --mask")
    controls = again(carried.asking.get(CONTROL, ()), asking.get(CONTROL, ()), options.source)
    conditions = conditions_of({**carried.asking, **asking, CONTROL: controls, "models_dirs": models_dirs})
    asked = with_paths(asked, models_dirs)
    _check_schedules(asked)
    kept = _without_idle(carried.request, asked)
    if note := _guided_otherwise(kept, asked, read()) if kept else "":
        say(f"note: {note}", err=True)
    if "prefer" in wished:  # which decides anew
        kept.pop("step_cache", None)
    wanted = Request(**{**kept, **asked, "prompt": said, "conditions": conditions}).checked()
    drawn = variants(wanted, options.wildcards) if options.source is None or prompt else (wanted,)
    requests = tuple(_adapted(request, adapting, models_dirs).checked() for request in drawn)
    count = wanted.num_images
    writing = options.writing
    saver = Saver(target(options.output, WORD.sub("", wanted.prompt), count, writing.form), count, writing)
    fields = wishes(wished, _carried_precision(options, carried, wished))
    with load(model, device=options.device, plan=plan, local_files_only=offline, **fields) as pipeline:
        for note in (*pipeline.hardware.passed_over, *pipeline.spec.notes):
            say(as_typed(f"note: {note}"), err=True)
        try:
            result = _run(pipeline, requests, saver)
        except BaseException:
            saver.tell()
            raise
    saver.sheet(result.images)
    if options.as_json:
        say_json(_report(result, saver))
    else:
        say(_closing_line(result, saver))


# Options that are of this machine, or of its files.
_HERE = {
    "source": "--from",
    "plan_file": "--plan",
    "models_dirs": "--models-dir",
    "wildcards": "--wildcards",
    "no_text_cache": "--no-text-cache",
}


def _paint_there(options: Options, asked: Mapping[str, Any], wished: Mapping[str, Any]) -> None:
    """Paint at the server that --connect names: models, adapters and upscalers are named as there."""
    from .remote import paint

    given = [option for name, option in _HERE.items() if getattr(options, name)]
    given += ["--device"] * (options.device != "auto") + ["--control"] * (CONTROL in asked)
    if given:
        raise TightfitError(
            f"{given[0]} is of this machine, and --connect paints at another: leave one of them out"
        )
    if (prompt := read_prompt(options.prompt, options.prompt_file)) is None:
        raise TightfitError('there is no prompt: tightfit "a red heart"')
    count, writing = asked.get("num_images", 1), options.writing
    saver = Saver(target(options.output, WORD.sub("", prompt), count, writing.form), count, writing)
    painted = paint(
        options.connect or "", {"prompt": prompt, **asked}, {**wished, "model": options.model}, saver
    )
    saver.sheet(painted.images)
    files = [str(path) for path in saver.paths]
    if options.as_json:
        grid: dict[str, Any] = {"grid": str(saver.grid)} if saver.grid else {}
        notices = list(painted.notices)
        say_json({**painted.summary, "notices": notices, "image": files[0], "images": files, **grid})
    else:
        plans = "; then ".join(painted.summary.get("plan", ()))
        seconds = painted.summary.get("seconds", 0.0)
        say(f"{', '.join(files)} · at {options.connect} · {plans}, {seconds:.1f} s")


def _check_schedules(asked: Mapping[str, Any]) -> None:
    """Raise TightfitError for two schedules, one of them in the name of the scheduler."""
    scheduler, schedule = asked.get("scheduler"), asked.get("schedule")
    named = split(scheduler)[1] if scheduler and schedule else AUTOMATIC
    if named != AUTOMATIC and schedule_of(str(schedule)) != named:
        raise TightfitError(
            f"--scheduler {scheduler} names the schedule {named}, and --schedule {schedule}: give one of them"
        )


# What a picture carries, and what is typed in its place.
_INSTEAD = {"hires": "hires_size", "hires_size": "hires"}


def _without_idle(carried: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a picture carries, without what does nothing beside the options that are typed."""
    void = [name for name in idle({**carried, **asked}) if name in carried and name not in asked]
    void += [name for name, other in _INSTEAD.items() if name in carried and other in asked]
    if void:
        say(as_typed(f"note: not honoured beside these options: {', '.join(void)}"), err=True)
    return {name: value for name, value in carried.items() if name not in void}


def _taken(carried: Carried, read: Callable[[], ModelSpec]) -> Carried:
    """What a picture carries, without what is not for models of this kind."""
    fields = of_others(carried.request, read()) if carried.request else []
    void = [*untaken(read, carried.asking), *fields]
    if void:
        say(as_typed(f"note: {read().name} takes no {', '.join(void)}, by which it was painted"), err=True)
    request = {name: value for name, value in carried.request.items() if name not in void}
    asking = {name: value for name, value in carried.asking.items() if name not in void}
    return replace(carried, request=request, asking=asking)


def _guided_otherwise(kept: Mapping[str, Any], asked: Mapping[str, Any], spec: ModelSpec) -> str:
    """A note where a picture's guidance, which is kept, is that of a distilled model, and this is none; or
    the other way round."""
    scale, usual = kept.get("guidance_scale"), spec.default_guidance
    if scale is None or "guidance_scale" in asked or (scale <= 1) == (usual <= 1) or spec.takes_no_guidance:
        return ""
    said, its_own, cure = f"{scale:g}", f"{usual:g}", f"--guidance-scale {usual:g}"
    if (steps := kept.get("num_inference_steps")) and "num_inference_steps" not in asked:
        said, its_own = f"{said} in {steps} steps", f"{its_own} in {spec.default_steps}"
        cure += f" --steps {spec.default_steps}"
    return f"the guidance scale of the picture, {said}, is kept; {spec.name} has {its_own}: {cure}"


def _adapted(request: Request, adapting: Mapping[str, Any], models_dirs: Sequence[Path]) -> Request:
    """With the adapters that were given, and those that the prompt names."""
    prompt, named = from_words(request.prompt, models_dirs) if request.prompt else (request.prompt, ())
    adapters = *request.adapters, *written(adapting, models_dirs)
    return replace(request, prompt=prompt, adapters=(*adapters, *named))


def _carried(options: Options, adapting: Mapping[str, Any]) -> Carried:
    """What the picture of --from asks for, nothing without one. A model, or adapters of a kind, that are
    typed are not looked for."""
    from ..infotext import Carried, read

    given = [option for option, texts in adapting.items() if texts] + ["model"] * (options.model is not None)
    source = options.source
    carried = read(source, given, options.models_dirs or ()) if source else Carried({})
    for notice in carried.notices:
        say(f"note: {notice}", err=True)
    return carried


def _model(options: Options, carried: Carried, plan: Plan | None) -> tuple[str, bool]:
    """Its name, and whether nothing is fetched: a picture alone never starts a download. Raises TightfitError
    for the model of a picture that is not here."""
    if options.model is not None:
        return options.model, False
    if options.source and carried.model is None:
        said = f"was painted with {carried.model_said}, which is in no folder of models"
        lost = said if carried.model_said else "does not say where its model is"
        raise TightfitError(f"{options.source} {lost}: name it with --model")
    return carried.model or (plan.model if plan else "emoji"), options.source is not None


def _carried_precision(options: Options, carried: Carried, wished: Mapping[str, Any]) -> str | None:
    """The precision that the picture was painted in, unless another model is to paint it now."""
    model = options.model
    if model is None or carried.model is None or carried.model in (model, str(Path(model).absolute())):
        return carried.precision
    if carried.precision and not wished.get("precision"):
        painted = f"{options.source} was painted in {carried.precision}, by another model"
        say(f"note: {painted}: --precision {carried.precision} paints in that", err=True)
    return None


def _run(
    pipeline: Pipeline, requests: Sequence[Request], save: Callable[[Image.Image, int], object]
) -> Result:
    """Run to the end, each picture saved as soon as it is decoded.

    Ctrl-C ends it after those that are painted, twice at once.
    """
    interrupts.tidily()
    with progress_bar(8) as bar:
        task, events, result = bar.add_task("loading", total=1), _events(pipeline, requests), None
        advance: Callable[[], Event] = lambda: next(events)  # noqa: E731
        interrupted, unsaved = False, None
        while result is None:
            try:
                event = advance()
                lean.settle()  # all is imported, or nearly
                unsaved = event if event.picture else None
                for notice in event.notices:
                    text = printable(as_typed(f"note: {notice}"))
                    bar.console.print(text, markup=False, emoji=False, soft_wrap=True)
                bar.update(task, description=event.stage, completed=event.step, total=event.steps)
                unsaved = _save(unsaved, save)
                result, advance = event.result, lambda: next(events)
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted, advance = True, lambda: events.throw(KeyboardInterrupt())
                unsaved = _save(unsaved, save)
    return result


def _events(pipeline: Pipeline, requests: Sequence[Request]) -> Generator[Event, None, None]:
    """Those of all requests, one after the other, as if they were of one."""
    results: list[Result] = []
    for request in requests:
        event = yield from _counted(pipeline.run(request), sum(len(result.images) for result in results))
        assert event.result
        results.append(event.result)
        if len(results) == len(requests):
            yield replace(event, result=joined(results))


def _counted(events: Generator[Event, None, None], first: int) -> Generator[Event, None, Event]:
    """Those of one request, whose pictures count from `first`; the last is returned. The first interrupt
    goes on to it, wherever it comes."""
    advance: Callable[[], Event] = partial(next, events)
    interrupted = False
    while True:
        try:
            event = advance()
            if event.result:
                return event
            yield replace(event, image=first + event.image)
            advance = partial(next, events)
        except KeyboardInterrupt as interrupt:
            if interrupted:
                raise
            interrupted, advance = True, partial(events.throw, interrupt)


def _save(event: Event | None, save: Callable[[Image.Image, int], object]) -> None:
    if event and event.picture:
        save(event.picture, event.image)


def _closing_line(result: Result, saver: Saver) -> str:
    paths = saver.paths
    files = str(paths[0]) if len(paths) == 1 else f"{paths[0]} … {paths[-1].name}"
    files += f" and {saver.grid.name}" if saver.grid else ""
    stages = "; then ".join(
        ", ".join(f"{name} {m.seconds:.1f} s {shown(m.peak_bytes)}" for name, m in one.stages.items())
        for one in result.passes
    )
    plans = "; then ".join(dict.fromkeys(one.plan.summary() for one in result.passes))
    peak = f"peak {shown(result.peak_bytes)} of {shown(result.predicted_bytes)} predicted"
    process = f"process {shown(result.process_bytes)}"
    return f"{files} · seed {result.request.seed} · {plans} · {stages} · {peak}, {process}"


def _report(result: Result, saver: Saver) -> dict[str, Any]:
    more: dict[str, Any] = {"grid": str(saver.grid)} if saver.grid else {}
    if result.earlier:
        more["earlier"] = [asdict(one) | {"plan": one.plan.to_json()} for one in result.earlier]
    return {
        "request": result.request.to_json(),
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
        "image": str(saver.paths[0]),
        "images": [str(path) for path in saver.paths],
        **more,
    }
