"""A request that is painted in two passes: hires fix, and a refiner, which goes on from another model. Each
pass is a job of its own; the second is handed what the first has painted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters.vae import Vae
from .conditions.handed import LATENTS, Handed, enlarging
from .conditions.image import ImageToImage
from .errors import TightfitError
from .fields import described
from .files import Stamps, stamps
from .models import schedulers
from .models.families.family import Role
from .models.hub import inspect
from .models.spec import ModelSpec
from .placement import Placement
from .planner.wishes import Wishes
from .request import Job, Request, Share, check_sides, sides_of

if TYPE_CHECKING:
    from .planner.plan import Plan

_ONE_PASS: dict[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(Request)
    if field.name.startswith(("hires", "refiner"))
}
_MOST = {name: about.bounds[1] for name, about in described(Request).items() if about.bounds}
_MOST_COVERING = 2**26  # pixels, as of a picture that is given
_MOST_SHARE = 0.999  # as A1111 has it


def passes(job: Job) -> tuple[Job, ...]:
    """The jobs that `job` takes, one after another: itself, or two. Raises TightfitError for a second that
    cannot be done."""
    if not job.is_enlarged and job.refiner is None:
        return (job,)
    _check(job)
    return _larger(job) if job.refiner is None else _refined(job, job.refiner)


def _check(job: Job) -> None:
    what = "refiner" if job.refiner is not None else "hires"
    if any(isinstance(condition, ImageToImage) for condition in job.conditions):
        raise TightfitError(f"{what} is of pictures painted from text alone: leave it out, or the picture")
    if job.spec.channels_beside:
        raise TightfitError(
            f"{what} is of pictures painted from text alone, and {job.spec.name} is not for that"
        )


def _larger(job: Job) -> tuple[Job, Job]:
    """As A1111: so many steps are taken as are asked for, the last of a schedule that is longer by the
    strength. The second takes them all in full: where every second one was cached there, the emoji at twice
    its size had 30 dB, and 59 where it was cached in the first alone."""
    taken = job.hires_steps or job.num_inference_steps
    steps = _steps(job.hires_strength, taken)
    height, width = _size(job)
    request = replace(
        job.request,
        **_ONE_PASS,
        prompt=job.prompt if job.hires_prompt is None else job.hires_prompt,
        scheduler=job.hires_scheduler or job.scheduler,
        num_inference_steps=steps,
        step_cache=1,
        height=height,
        width=width,
        conditions=(*job.conditions, enlarging(job.hires_upscaler)),
    )
    share = Share(begin=steps - taken, counts=taken, whole=job)
    second = request.resolve(job.model, share)
    if second.prompting.said == job.prompting.said:
        second = replace(second, share=replace(share, encodes=False))
    return _first(job, Share(decodes=job.hires_upscaler not in LATENTS, whole=job)), second


def _steps(strength: float, taken: int) -> int:
    """Of the whole schedule, of which so many are taken."""
    steps, most = int(taken / min(strength, _MOST_SHARE)), _MOST["num_inference_steps"]
    if steps > most:
        raise TightfitError(
            f"hires_strength {strength:g} takes {taken} steps of a schedule of {steps}, and {most} are the "
            "most: give a larger one, or fewer hires_steps"
        )
    return steps


def _size(job: Job) -> tuple[int, int]:
    """Height and width. By a factor they are rounded down to what the model can do, as A1111 rounds them."""
    step, most = job.spec.latents.multiple, _MOST["width"]
    if sides := sides_of("hires_size", job.hires_size):
        check_sides({"hires_size's width": sides[0], "hires_size's height": sides[1]}, step)
        if sides[0] < job.width and sides[1] < job.height:  # else it is cut of what covers it, as A1111 does
            raise TightfitError(
                f"hires_size {sides[0]}x{sides[1]} is smaller than the first pass's "
                f"{job.width}x{job.height}: give one that is as large on a side"
            )
        factor = max(sides[0] / job.width, sides[1] / job.height)
        if (covering := int(job.width * job.height * factor**2)) > _MOST_COVERING:
            raise TightfitError(
                f"hires_size {sides[0]}x{sides[1]} is cut of {covering} pixels, and {_MOST_COVERING} are the "
                f"most: give one more like {job.width}x{job.height}"
            )
        return sides[1], sides[0]
    factor = job.hires or 1.0
    height, width = (int(side * factor) // step * step for side in (job.height, job.width))
    if max(height, width) > most:
        raise TightfitError(f"hires {factor:g} makes {width}x{height}, and a side has at most {most} pixels")
    return height, width


def _refined(job: Job, name: str) -> tuple[Job, Job]:
    """The last steps by another model, from `refiner_start` on, as diffusers and A1111 count it."""
    model, steps = _model(name), job.num_inference_steps
    _check_latents(job.spec, model)
    begin = schedulers.steps_before(job.scheduler, job.spec, steps, job.refiner_start, job.tuning)
    if not 0 < begin < steps:
        who = "nothing" if begin else "all"
        raise TightfitError(
            f"refiner_start {job.refiner_start:g} of {steps} steps leaves {who} to the refiner: "
            "give another, or more steps"
        )
    adapters = tuple(adapter for adapter in job.adapters if isinstance(adapter, Vae))
    request = replace(job.request, **_ONE_PASS, adapters=adapters, conditions=(Handed(),))
    second = request.resolve(model, Share(begin=begin, whole=job))
    return _first(job, Share(end=begin, decodes=False, whole=job)), second


def _first(job: Job, share: Share) -> Job:
    return replace(job, **_ONE_PASS, share=share)


def _model(name: str) -> ModelSpec:
    """Read from files alone: a request never starts a download."""
    with suppress(OSError, ValueError):
        return _read(name, stamps(Path(name)))
    return _read(name, ())


@lru_cache(2)
def _read(place: str, written: Stamps) -> ModelSpec:  # noqa: ARG001
    """The same object for the same files, as what is planned for it is kept by that."""
    return inspect(place, local_files_only=True)


def _check_latents(spec: ModelSpec, other: ModelSpec) -> None:
    """Raise TightfitError where one model's latents say nothing to the other."""
    if (spec.latent_affine, spec.latents) != (other.latent_affine, other.latents):
        raise TightfitError(
            f"{other.name} cannot go on from {spec.name}, whose latents are others: name a model of its kind"
        )


def left(first: Job, placements: Mapping[str, Placement], second: Job) -> tuple[tuple[str, Placement], ...]:
    """What the first pass leaves loaded for the second, which runs by the same model: what is resident, and
    the denoiser, if the second begins with that."""
    if first.model is not second.model:
        return ()
    names = {name for name, placement in placements.items() if placement.residency == "resident"}
    before = (part.role for part in second.spec.components.values() if part.role is not Role.TEXT)
    if not first.share.decodes and not second.share.encodes and Role.ENCODER not in before:
        names.add(first.spec.denoiser.name)
    return tuple((name, placement) for name, placement in placements.items() if name in names)


def wishes_after(first: Job, plan: Plan, second: Job, wishes: Wishes) -> Wishes:
    """What is wished of the second pass: to run beside what the first leaves loaded, and in its precision.
    Another model is loaded for this request alone, in any precision."""
    wishes = replace(wishes, cache_every=plan.step_cache)  # pictures carry one for both
    if first.model is not second.model:
        return replace(wishes, requests=1)
    return replace(wishes, loaded=left(first, plan.loaded, second), after=plan.denoiser)


def mixed(first: Plan, second: Plan) -> tuple[str, ...]:
    """What to say of two passes in different precisions, of which a picture can carry one."""
    before, now = first.denoiser.arithmetic, second.denoiser.arithmetic
    if before == now:
        return ()
    said = f"the first pass is in {before}, the second in {now}, which alone is what pictures carry"
    cure = f": --precision {second.precision} is for both" if first.model == second.model else ""
    return (said + cure,)
