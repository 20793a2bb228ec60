"""Which way to run a request: every candidate is costed, the fastest that fits is taken. No device is
touched, no weight read."""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..budget import BUILDING
from ..errors import TightfitError
from ..machine.hardware import Hardware
from ..machine.process import PROCESS, address_space, process_context
from ..models.cures import exporting
from ..models.families.family import Role
from ..models.spec import ModelSpec
from ..placement import DYNAMIC, GRAPHS, STORED, Placement
from ..request import Job, Request
from ..texts import TEXTS
from ..units import shown
from .candidates import ways
from .estimate import ESTIMATOR, PSNR, Estimate, caching_psnr, holder
from .exported import exported, may_export
from .plan import MOST_PER_CALL, Plan, Verdict
from .saved import checked as checked  # a plan from a file is a choice as well
from .saved import continued as continued
from .wishes import PREFERENCES, Wishes

SLOWER = 1.1  # times the seconds that painting may take to have room for the decoder of previews
_LONG_SECONDS, _YIELD_SECONDS = 0.01, 0.001
CACHED = 2, 3, 5  # steps of which one is taken in full, that the planner tries
WIDER = 1.02  # times as fast, twice as many pictures a call have to be
# The emoji's VAE takes 20 ms for a picture of 96x96 alone, 11 each for 4 at once, and 11 for 16 (2 cores).
_DECODED = 4
_FEW_CALLS = 2  # of a U-Net, which streams faster than it is loaded where it is called once
SAME = 0.001  # a share of the seconds: what differs by less is as fast, and then quality and memory decide


class NoneFitsError(TightfitError):
    """No way to run a job fits. `plans` are those that were costed, none where it was plain without."""

    def __init__(self, text: str, plans: Sequence[Plan] = ()) -> None:
        super().__init__(text)
        self.plans = tuple(plans)


class UnwantedError(TightfitError):
    """Nobody waits for the plans any more."""


def _always() -> bool:
    return True


def plan(
    hardware: Hardware,
    spec: ModelSpec,
    request: Request | None = None,
    wishes: Wishes | None = None,
    is_wanted: Callable[[], bool] = _always,
) -> list[Plan]:
    """Every way to run `request` (the model's native size by default) on `hardware`, best first: those that
    fit, fastest first, then the others by what they lack. The first is marked as chosen, if any fits.

    Raises UnwantedError once `is_wanted` says no, which is asked before each way is costed.
    """
    job = (request or Request("a")).resolve(spec)
    return every(ESTIMATOR.estimate(hardware, job, wishes or Wishes()), is_wanted)


def every(estimate: Estimate, is_wanted: Callable[[], bool] = _always) -> list[Plan]:
    """As `plan`."""
    found = _costed(estimate, is_wanted)
    if not found:
        raise _no_way(estimate.spec)
    fitting = _fitting(found, estimate)
    if fitting:
        best = _best(fitting, estimate)
        chosen = _chosen(best, estimate)
        rest = [p for p in fitting if p is not best or p.texts_known != chosen.texts_known]
        fitting = [chosen, *(beaten(p, chosen) for p in rest)]
    plans = fitting + sorted((p for p in found if not p.fits), key=lambda p: p.predicted.peak_bytes)
    return [_saving(p, plans) if p.chosen and p.step_cache > 1 else p for p in plans]


def first(estimate: Estimate, is_wanted: Callable[[], bool] = _always) -> Plan | None:
    """The plan that `plan` would put first, where a few ways tell: a seventh of the dry runs. None where not.

    They are those that no other way is faster than, in the same arithmetic: whatever takes less memory, by
    streaming, by rounding weights as they are loaded, by one half of guidance after the other, or by strips,
    pays with time. So others matter only where one of these is as fast, and does not fit.
    """
    job, wishes = estimate.job, estimate.wishes
    if job.calls < _FEW_CALLS or wishes.after is not None:
        return None
    found = _costed(estimate, is_wanted, lambda cfg, way: _is_fast(job.spec, wishes, cfg, way))
    if not any(p.fits for p in found):
        return None
    plain = min(estimate.painting_seconds(p) for p in found if p.fits)
    best = _best(_fitting(found, estimate), estimate)
    # Ways that do not fit were not costed with cached steps or more pictures a call, as the best may be.
    most = max(estimate.painting_seconds(best), plain) * (1 + SAME)
    short = (p for p in found if p.verdict in (Verdict.TOO_LARGE, Verdict.REFUSED))
    if any(estimate.painting_seconds(p) <= most for p in short):
        return None
    best = _chosen(best, estimate)
    return _saving(best, found) if best.step_cache > 1 else best


def _is_fast(spec: ModelSpec, wishes: Wishes, cfg: str, placements: Mapping[str, Placement]) -> bool:
    """Whether no way of the same arithmetic that may be taken in its place is faster."""
    unet, tilings = placements[spec.denoiser.name], {one.tiling for one in placements.values()}
    rounds = unet.precision not in (unet.compute, DYNAMIC) and unet.backend not in GRAPHS
    slower = {
        "cfg": cfg == "sequential",
        "residency": unet.residency == "streamed",
        "tiling": "tiled" in tilings,
        "precision": rounds and not spec.precision,
    }
    return not any(is_slower and getattr(wishes, name) == "auto" for name, is_slower in slower.items())


def _fitting(found: list[Plan], estimate: Estimate) -> list[Plan]:
    """Those of `found` that fit, the fastest first, once it has those for more pictures at once, and with
    cached steps, too."""
    found += [wider for p in _fastest(found, _residency) for wider in _wider(p, estimate)]
    found += [packed for p in _fastest(found, _arithmetic) for packed in _packed(p, estimate)]
    found += [cached for p in _fastest(found, _arithmetic) for cached in _cached(p, estimate)]
    if not any(p.fits for p in found):
        found += [known for p in found if (known := estimate.knowing(p))]
    return sorted(
        (p for p in found if p.fits),
        key=lambda p: (estimate.painting_seconds(p), -len(p.placements), p.predicted.peak_bytes),
    )


def _best(fitting: Sequence[Plan], estimate: Estimate) -> Plan:
    """Of plans that fit, the fastest first, the one to take."""
    alike = [p for p in fitting if _goes_on(p, estimate.wishes)] or [*fitting]
    alike = _as_to_previews(alike, estimate)
    fastest = alike[0].predicted.seconds
    equal = [p for p in alike if p.predicted.seconds <= fastest * (1 + SAME)]
    return min(equal, key=_burden)


def _chosen(best: Plan, estimate: Estimate) -> Plan:
    """It was found as if no text were known, so that a text that comes again is painted alike to the last
    bit."""
    best = estimate.knowing(best) or best
    return replace(best, chosen=True, reason=_praise(best, estimate.wishes, estimate.hardware))


def _no_way(spec: ModelSpec) -> TightfitError:
    return TightfitError(
        f"no way to run {spec.name} has all that was asked for: leave one of the choices on auto"
    )


def refuse_impossible(hardware: Hardware, job: Job, wishes: Wishes) -> None:
    """Raise TightfitError for what runs nowhere as it is asked for, whatever the memory. Nothing is
    costed."""
    estimate, refusal = ESTIMATOR.estimate(hardware, job, wishes), ""
    with BUILDING:
        for way in ways(hardware, job, wishes):
            if (refusal := estimate.refusal(*way)) is None:
                return
    if not refusal:
        raise _no_way(job.spec)
    raise TightfitError(f"nothing runs {job.spec.name} as asked: {refusal}")


def _residency(plan: Plan) -> Hashable:
    return plan.denoiser.residency


def _arithmetic(plan: Plan) -> Hashable:
    """Also the precision, as a floor of quality may leave out the fastest."""
    return plan.denoiser.residency, plan.denoiser.arithmetic


def _fastest(plans: Sequence[Plan], kind: Callable[[Plan], Hashable]) -> list[Plan]:
    """Of each kind the fastest that fits."""
    fastest: dict[Hashable, Plan] = {}
    for one in sorted(filter(lambda p: p.fits, plans), key=lambda p: p.predicted.seconds):
        fastest.setdefault(kind(one), one)
    return list(fastest.values())


def _wider(narrow: Plan, estimate: Estimate) -> Iterator[Plan]:
    """The same with more pictures a call, twice as many or the last few as long as that is faster and fits;
    then with several decoded at once, if that is."""
    job, best = estimate.job, narrow
    most = min(estimate.wishes.images_per_call, job.num_images, MOST_PER_CALL)
    if job.conditions or job.whole is not job or narrow.denoiser.backend in GRAPHS:
        return  # what conditions do to a step is of one picture
    if narrow.denoiser.captured:
        return  # a last call of fewer would be one more graph

    def better(calls: int, decoded: int) -> Plan | None:
        wider = replace(estimate, images_per_call=calls, images_per_decode=decoded)
        plan = wider.plan(narrow.cfg, narrow.placements, narrow.budget_bytes)
        return plan if plan.predicted.seconds * WIDER <= best.predicted.seconds else None

    while (calls := min(2 * best.images_per_call, most)) > best.images_per_call:
        if not (wide := better(calls, 1)):
            break
        yield wide
        if not wide.fits:
            break
        best = wide
    may_decode = narrow.decoder.tiling == "whole" and narrow.decoder.backend not in GRAPHS
    decoded = min(most, _DECODED) if may_decode else 1
    if decoded > 1 and (wide := better(best.images_per_call, decoded)):
        yield wide


def _packed(plain: Plan, estimate: Estimate) -> Iterator[Plan]:
    """The same in fp32 by weights that are packed for oneDNN, where pictures need not be diffusers' to the
    last bit."""
    floor, unet = PREFERENCES.get(estimate.wishes.prefer), plain.denoiser
    if floor is None or PSNR["packed"] < floor or plain.device != "cpu" or unet.residency == "streamed":
        return
    if (unet.backend, unet.precision) == ("torch", "fp32"):
        stepping = (*estimate.spec.of_role(Role.DENOISER), *estimate.spec.of_role(Role.CONTROL))
        packs = {each.name for each in stepping if plain.placements[each.name].precision == "fp32"}
        placements = {
            name: replace(placement, packed=name in packs) for name, placement in plain.placements.items()
        }
        yield estimate.of(plain).plan(plain.cfg, placements, plain.budget_bytes)


def _cached(whole: Plan, estimate: Estimate) -> Iterator[Plan]:
    """The same with steps that are cached, where that is left to the planner, as it prefers. What that costs
    is known of one text: with another joined by AND, or in its place in some steps, it was 15 to 37 dB."""
    floor, job = PREFERENCES.get(estimate.wishes.prefer), estimate.job
    if floor is None or job.step_cache or estimate.wishes.cache_every or not job.is_steady:
        return
    for every in CACHED:
        cached = replace(estimate.of(whole), step_cache=every)
        if caching_psnr(every, job) >= floor and whole.denoiser.backend not in GRAPHS:
            yield cached.plan(whole.cfg, whole.placements, whole.budget_bytes)


def _saving(plan: Plan, plans: Sequence[Plan]) -> Plan:
    """With what caching steps saves and costs beside the same way without, if that is among the plans."""
    for whole in plans:
        if whole.step_cache == 1 and _way(whole) == _way(plan):
            saved = whole.predicted.seconds - plan.predicted.seconds
            costs = f"{plan.predicted.psnr:.0f} dB in place of {whole.predicted.psnr:.0f}"
            said = f"1 step of {plan.step_cache} in full saves {saved:.1f} s of {whole.predicted.seconds:.1f}"
            return replace(plan, reason=f"{plan.reason}; {said}, {costs}")
    return plan


def _way(plan: Plan) -> tuple[Any, ...]:
    """How it runs, whether or not steps are cached."""
    return plan.placements, plan.cfg, plan.images_per_call, plan.images_per_decode


def _costed(
    estimate: Estimate,
    is_wanted: Callable[[], bool],
    matters: Callable[[str, Mapping[str, Placement]], bool] = lambda *_: True,
) -> list[Plan]:
    """Every way that matters. Other threads may plan, or load, between two of them."""
    budget = budget_of(estimate.hardware, estimate.wishes)
    found, every = [], ways(estimate.hardware, estimate.job, estimate.wishes)
    with _cycles_left():
        while True:
            if not is_wanted():
                raise UnwantedError("nobody waits for these plans any more")
            start = time.perf_counter()
            with BUILDING:
                if (way := next(every, None)) is None:
                    return found
                if matters(*way):
                    found += estimate.plans(*way, budget)
            if time.perf_counter() - start > _LONG_SECONDS and threading.active_count() > 1:
                time.sleep(_YIELD_SECONDS)  # who takes a lock again at once takes it from all who wait


@contextmanager
def _cycles_left() -> Iterator[None]:
    """Without Python's search for cycles, which takes a fifth of the time of importing torch, diffusers and
    transformers, and of following what they build: hardly anything of all that is ever freed."""
    searched = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searched:
            gc.enable()


def none_fits(plans: Sequence[Plan], hardware: Hardware, job: Job, wishes: Wishes) -> NoneFitsError:
    """The error that says what would fit: a smaller picture, or a larger budget; or that what is asked for
    runs nowhere."""
    spec, asked = job.spec, f"{job.width}x{job.height}"
    large = [plan for plan in plans if plan.verdict is Verdict.TOO_LARGE]
    on_device = [  # for which the host has not the memory
        plan
        for plan in large
        if plan.predicted.peak_bytes + plan.predicted.context_bytes <= plan.budget_bytes
    ]
    if on_device:
        least = min(on_device, key=lambda plan: plan.predicted.host_bytes)
    else:
        least = min(large or plans, key=lambda plan: plan.predicted.peak_bytes)
    fewer_bits = _once_exported(hardware, job, wishes, least)
    if not large:  # no memory would help
        return NoneFitsError(
            f"nothing runs {spec.name} at {asked} as asked: {plans[0].cause}{fewer_bits}", plans
        )
    budget_bytes, context_bytes = least.budget_bytes, least.predicted.context_bytes
    if on_device:
        said = f"nothing runs {spec.name} at {asked} as asked: it {least.reason}"
        return NoneFitsError(said + fewer_bits, plans)
    context_bytes = _context_from_now_on(hardware, context_bytes)
    cure = _more_memory(hardware, asked, least.predicted.peak_bytes + context_bytes)
    if least.predicted.context_bytes >= budget_bytes:
        cure = f"{holder(hardware)} alone takes {shown(context_bytes)}, and {cure}"
    elif smaller := _largest_of_this_shape(hardware, job, wishes, plans):
        cure = f"the largest of this shape that fits is {smaller}, or {cure}"
    said = f"{spec.name} does not fit {shown(budget_bytes)}: {cure} (with {least.summary()})"
    return NoneFitsError(said + fewer_bits + _once_known(large, hardware, job), plans)


def _once_exported(hardware: Hardware, job: Job, wishes: Wishes, least: Plan) -> str:
    """What to add where the model would fit if it streamed in fewer bits, else as `least` does: weights that
    are quantised as they are loaded do not stream."""
    ways = {"residency": "streamed", "attention": least.denoiser.attention, "cfg": least.cfg}
    asked = {
        name: value for name in (*ways, "backend", "provider") if (value := getattr(wishes, name)) != "auto"
    }
    is_whole = job.spec is job.model and job.whole is job
    if not may_export(job.spec) or not is_whole or asked.items() - {"backend": "torch", **ways}.items():
        return ""
    ways |= {"tiling": least.decoder.tiling, "precision": "auto"}
    for precision in STORED if wishes.precision == "auto" else {*STORED} & {wishes.precision}:
        small = job.request.resolve(exported(job.spec, precision))
        if plan(hardware, small.model, small, replace(wishes, **ways))[0].fits:
            return f"; in {precision} it fits, once it is written so: {exporting(job.spec.name, precision)}"
    return ""


def _once_known(large: Sequence[Plan], hardware: Hardware, job: Job) -> str:
    """What to add where it is the text encoders alone that do not fit, and may run once."""
    if not TEXTS.most_bytes or job.spec.of_role(Role.ENCODER):
        return ""
    for plan in sorted(large, key=lambda plan: plan.predicted.peak_bytes):
        painting = max(count for stage, count in plan.predicted.stages.items() if stage != "encode")
        budget_bytes = plan.predicted.peak_bytes + plan.predicted.context_bytes
        if painting + plan.predicted.context_bytes <= plan.budget_bytes < budget_bytes <= hardware.free_bytes:
            once = f"{_option(hardware)} {-(-budget_bytes // 2**20)}MiB --precision {plan.precision}"
            return f"; after a picture with {once} its texts are in the text cache, and it fits"
    return ""


def _context_from_now_on(hardware: Hardware, context_bytes: int) -> int:
    """Planning makes this process larger, and whoever detects next counts that."""
    if hardware.device == "cpu" and hardware.providers is None and context_bytes >= PROCESS:
        return max(context_bytes, process_context())
    return context_bytes


def _more_memory(hardware: Hardware, asked: str, needed_bytes: int) -> str:
    """The budget for a size that is asked for, or how much would have to be free for it."""
    if needed_bytes <= hardware.free_bytes:
        return f"{asked} needs {_option(hardware)} {-(-needed_bytes // 2**20)}MiB"
    return f"{asked} needs {shown(needed_bytes)} free, {shown(hardware.free_bytes)} are{_limit(hardware)}"


def refuse_hopeless(hardware: Hardware, job: Job, wishes: Wishes) -> None:
    """Raise TightfitError for what no way of running can fit, found out without following all of them: where
    there is no room beside the context, or none for one feature map of the picture. Following how 16384x16384
    runs takes minutes."""
    room = budget_of(hardware, wishes) - hardware.context_bytes
    if room <= 0:
        plans = plan(hardware, job.model, job, _frugal(job, wishes))
        raise none_fits(plans, hardware, job, wishes)
    map_bytes = _largest_map(hardware, job.spec, job.width, job.height)
    if map_bytes > room:
        raise _no_room_for_a_map(hardware, job, wishes, map_bytes)


def _no_room_for_a_map(hardware: Hardware, job: Job, wishes: Wishes, map_bytes: int) -> NoneFitsError:
    """The error for a picture whose one feature map is too much. The plans that its cure is from are of the
    native size."""
    height, width = job.spec.native_size
    native = replace(job, width=width, height=height)
    plans = plan(hardware, job.model, native, _frugal(native, wishes))
    runs = [plan for plan in plans if _runs_somewhere(plan)]
    if not runs:
        return none_fits(plans, hardware, job, wishes)
    smaller = _largest_of_this_shape(hardware, job, wishes, runs)
    cure = f"the largest of this shape that fits is {smaller}" if smaller else "no size of this shape fits"
    asked, budget_bytes = f"{job.width}x{job.height}", budget_of(hardware, wishes)
    return NoneFitsError(
        f"{job.spec.name} does not fit {shown(budget_bytes)}: "
        f"one feature map of {asked} takes {shown(map_bytes)}, {cure}"
    )


def _runs_somewhere(plan: Plan) -> bool:
    """Whether some budget would run it as it was asked for."""
    return plan.verdict in (Verdict.FITS, Verdict.TOO_LARGE)


def _frugal(job: Job, wishes: Wishes) -> Wishes:
    """Wishes for the ways that take little memory, where they are torch's: half as many calls are followed
    for these."""
    if any(component.graph for component in job.spec.components.values()):
        return wishes
    least: dict[str, str] = {"tiling": "tiled"}
    if job.branches > 1:
        least["cfg"] = "sequential"
    return replace(
        wishes, **{name: value for name, value in least.items() if getattr(wishes, name) == "auto"}
    )


def budget_of(hardware: Hardware, wishes: Wishes) -> int:
    return hardware.free_bytes if wishes.budget is None else min(wishes.budget, hardware.free_bytes)


def _limit(hardware: Hardware) -> str:
    bounded = hardware.device == "cpu" and hardware.providers is None and address_space() < math.inf
    return f" under this process's limit of {shown(address_space())} (ulimit -v)" if bounded else ""


def _option(hardware: Hardware) -> str:
    return "--ram" if hardware.device == "cpu" else "--vram"


def _largest_map(hardware: Hardware, spec: ModelSpec, width: int, height: int) -> int:
    """Bytes, in 16 bits, of the widest map that the U-Net or the VAE has of a whole picture, however it
    runs."""
    if hardware.device != "cpu" and any(component.graph for component in spec.components.values()):
        return 0  # it may run on the CPU beside
    pixels, channels = width * height, spec.unet.get("block_out_channels", [spec.latents.channels])[0]
    return 2 * max(pixels * spec.vae["block_out_channels"][0], pixels // spec.downsampling**2 * channels)


def _largest_of_this_shape(hardware: Hardware, job: Job, wishes: Wishes, plans: Sequence[Plan]) -> str | None:
    """By the way of running that takes the least memory at the size asked for; or by the least that streams,
    as of a small picture it is the weights that take memory."""
    runs = sorted(filter(_runs_somewhere, plans), key=lambda plan: plan.predicted.peak_bytes)
    ways = [*runs[:1], *[p for p in runs[1:] if p.denoiser.residency == "streamed"][:1]]
    found = (_largest_that_fits(hardware, job, wishes, way) for way in ways)
    return next(filter(None, found), None)


def _largest_that_fits(hardware: Hardware, job: Job, wishes: Wishes, least: Plan) -> str | None:
    """The largest size of the request's shape that runs as `least` does."""
    spec, width, height, step = job.spec, job.width, job.height, job.spec.latents.multiple * 8
    shorter, budget = min(width, height), budget_of(hardware, wishes)
    sizes = [(round(width * side / shorter / step) * step, round(height * side / shorter / step) * step)
             for side in range(step, shorter, step)]  # fmt: skip
    sizes = [size for size in sizes if hardware.context_bytes + _largest_map(hardware, spec, *size) <= budget]
    low, high, best = 0, len(sizes) - 1, None
    with _cycles_left():
        while low <= high:  # the sizes grow
            middle = (low + high) // 2
            smaller = replace(job, width=sizes[middle][0], height=sizes[middle][1])
            estimate = ESTIMATOR.estimate(hardware, smaller, wishes)
            if estimate.best(least.cfg, least.placements, budget).fits:
                best, low = f"{sizes[middle][0]}x{sizes[middle][1]}", middle + 1
            else:
                high = middle - 1
    return best


def _burden(plan: Plan) -> tuple[float, ...]:
    """By what to choose among plans that are as fast: quality, then doing nothing that need not be, then
    memory."""
    streamed = any(placement.residency == "streamed" for placement in plan.placements.values())
    return (
        -plan.predicted.psnr,
        streamed,
        plan.cfg == "sequential",
        plan.decoder.tiling == "tiled",
        plan.predicted.peak_bytes,
        plan.predicted.seconds,
    )


def _goes_on(plan: Plan, wishes: Wishes) -> bool:
    """Whether it runs in the precision of the pass before."""
    return wishes.after is not None and plan.denoiser.arithmetic == wishes.after.arithmetic


def _as_to_previews(plans: list[Plan], estimate: Estimate) -> list[Plan]:
    """Of plans that fit, those that decode previews, or, where these paint more slowly, those that do not."""
    every = len(estimate.spec.components)
    decoding, others = ([p for p in plans if (len(p.placements) == every) is has] for has in (True, False))
    seconds = [min(map(estimate.painting_seconds, some), default=math.inf) for some in (decoding, others)]
    return decoding if decoding and seconds[0] <= SLOWER * seconds[1] else others


def _praise(best: Plan, wishes: Wishes, hardware: Hardware) -> str:
    forced = [
        getattr(wishes, name)
        for name in ("backend", "provider", "precision", "compute", "residency", "attention", "tiling", "cfg")
    ]
    asked = [choice for choice in forced if choice != "auto"]
    left = best.budget_bytes - best.predicted.context_bytes - best.predicted.peak_bytes
    slow = (
        ""
        if best.denoiser.compute in hardware.precisions
        else f"; {hardware.name} has no arithmetic for {best.denoiser.compute}, expect it to be slow"
    )
    by = f" ({', '.join(asked)} asked for)" if asked else ""
    if wishes.residency == "streamed" and wishes.budget is None:
        by += (
            "; nothing is kept loaded, "
            f"{'--ram' if hardware.device == 'cpu' else '--vram'} BYTES keeps what it allows"
        )
    goes_on = wishes.precision == "auto" and _goes_on(best, wishes)
    alike = " in the precision of the pass before" if goes_on else ""
    return f"the fastest that fits{alike}, with {shown(left)} to spare{by}{slow}"


def beaten(plan: Plan, best: Plan) -> Plan:
    """With the reason why it was not taken though it fits."""
    ratio = plan.predicted.seconds / best.predicted.seconds
    more = plan.predicted.peak_bytes - best.predicted.peak_bytes
    if len(plan.placements) < len(best.placements):
        reason = "fits, but without the decoder of previews"
    elif ratio < 1 - SAME:
        reason = "fits, and is faster, but not in the precision of the pass before"
    elif 1 + SAME < ratio < 1.005:
        reason = "fits, hardly slower"
    elif ratio > 1 + SAME:
        reason = f"fits, but is {ratio:.2f} times as slow"
    elif more > 0:
        reason = f"fits, as fast, but takes {shown(more)} more"
    else:
        reason = "fits, no better"
    return replace(plan, reason=reason)
