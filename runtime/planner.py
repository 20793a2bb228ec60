"""Which way to run a request: every candidate is costed, the fastest that fits is taken. No device is touched, no weight read."""

from __future__ import annotations

import gc
import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, product
from typing import Any, TypeVar

from . import schedulers
from .backends import engine
from .errors import TightfitError
from .hardware import CPU_PROVIDER, PACKAGES, PROCESS, PROVIDERS, Hardware, process_context, provider_name, provider_problems
from .latency import PACK_SECONDS, PIN_SECONDS, QUANTISE_SECONDS, SESSION_SECONDS, call_seconds
from .memory import Footprint, peak, shown
from .plan import ATTENTIONS, CFG, DYNAMIC, QUANTISED, RESIDENCIES, STAGES, STORED, TILINGS, Placement, Plan, Predicted, Wishes
from .process import address_space
from .recent import Recent
from .request import Request
from .spec import Component, ModelSpec

# Decibels of PSNR against the fp32 picture of the same seed, the worst of 24 of emoji's (python -m tightfit.benchmarks.quality).
# Of int8 and int4, what rounding the weights costs; what they compute in comes on top.
PSNR = {"fp32": 99.0, "fp16": 60.0, "bf16": 49.0, "int8": 51.0, "int8-dynamic": 46.0, "int4": 33.0}
# Of the budget, left free where weights are kept loaded to fill it: predictions were 4.1 % off at most (benchmarks/predicted.py).
SLACK = 0.04
T = TypeVar("T")
_NEEDS = "needs"
_SAME = 0.001  # a share of the seconds: what differs by less is as fast, and then quality and memory decide


def plan(hardware: Hardware, spec: ModelSpec, request: Request | None = None, wishes: Wishes | None = None) -> list[Plan]:
    """Every way to run `request` (the model's native size by default) on `hardware`, best first: those that fit, fastest
    first, then the others by what they lack. The first is marked as chosen, if any fits."""
    wishes = wishes or Wishes()
    request = (request or Request("a")).resolve(spec)
    job = _job(hardware, spec, request, wishes)
    budget = _budget(hardware, wishes)
    with _cycles_left():
        found = [each for way in _candidates(hardware, spec, request, wishes) for each in job.plans(*way, budget)]
    if not found:
        raise TightfitError(f"no way to run {spec.name} has all that was asked for: leave one of the choices on auto")
    fitting = sorted((p for p in found if p.fits), key=lambda p: (p.predicted.seconds, p.predicted.peak_bytes))
    if fitting:
        fastest = fitting[0].predicted.seconds
        equal = [p for p in fitting if p.predicted.seconds <= fastest * (1 + _SAME)]
        best = min(equal, key=_burden)
        rest = [_beaten(p, best) for p in fitting if p is not best]
        fitting = [replace(best, chosen=True, reason=_praise(best, wishes, hardware)), *rest]
    return fitting + sorted((p for p in found if not p.fits), key=lambda p: p.predicted.peak_bytes)


@contextmanager
def _cycles_left() -> Iterator[None]:
    """Without Python's search for cycles, which takes a fifth of the time of importing torch, diffusers and transformers, and of
    following what they build: hardly anything of all that is ever freed."""
    searched = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searched:
            gc.enable()


def checked(saved: Plan, hardware: Hardware, spec: ModelSpec, request: Request, wishes: Wishes) -> Plan:
    """A plan from a file, predicted anew for this machine and request. Raises TightfitError if it cannot run here."""
    again = "make one for it with 'tightfit plan'"
    if saved.placements.keys() != spec.components.keys():
        raise TightfitError(f"this plan is for another kind of model than {spec.name}: {again}")
    for name, placement in saved.placements.items():
        if placement.backend not in spec.components[name].engines:
            raise TightfitError(f"this plan runs the {name} on {placement.backend}, {spec.name} has it not for that: {again}")
        if wishes.provider != "auto" and placement.provider not in ("", _provider(hardware, wishes.provider)):
            raise TightfitError(
                f"--provider {wishes.provider} is asked for, the plan says {placement.provider}: leave out one of them"
            )
    unet, vae = saved.placements["unet"], saved.placements["vae_decoder"]
    has = {name: getattr(unet, name) for name in ("backend", "precision", "compute", "residency", "attention")}
    for name, value in (has | {"tiling": vae.tiling, "cfg": saved.cfg}).items():
        if getattr(wishes, name) not in ("auto", value):
            raise TightfitError(f"{name} {getattr(wishes, name)} is asked for, the plan says {value}: leave out one of them")
    if vae.backend == "torch" and vae.compute == "fp16" != _vae_compute(hardware, spec, "fp16"):
        raise TightfitError(f"this plan runs {spec.name}'s VAE in fp16, in which it overflows: {again}")
    if spec.precision and unet.backend == "torch" and unet.precision not in _of_stored(spec.precision):
        raise TightfitError(f"this plan is for weights in {unet.precision}, {spec.name} is stored in {spec.precision}: {again}")
    if saved.device != hardware.device:
        raise TightfitError(f"this plan is for {saved.hardware} ({saved.device}), this machine runs on {hardware.device}: {again}")
    if saved.model != spec.name:
        raise TightfitError(f"this plan is for {saved.model}, not for {spec.name}: {again}")
    budget = min(saved.budget_bytes if wishes.budget is None else wishes.budget, hardware.free_bytes)
    new = _job(hardware, spec, request.resolve(spec), wishes).plan(saved.cfg, saved.placements, budget)
    if not new.fits:
        raise TightfitError(f"this plan, made for {saved.hardware}, does not run here: it {new.reason}; {again}")
    return replace(new, chosen=True, reason=f"read from a file; made for {saved.hardware}")


def none_fits(plans: Sequence[Plan], hardware: Hardware, spec: ModelSpec, request: Request, wishes: Wishes) -> TightfitError:
    """The error that says what would fit: a smaller picture, or a larger budget; or that what is asked for runs nowhere."""
    asked = f"{request.width}x{request.height}"
    least = min((p for p in plans if p.reason.startswith(_NEEDS)), key=lambda p: p.predicted.peak_bytes, default=None)
    if least is None:  # no memory would help
        return TightfitError(f"nothing runs {spec.name} at {asked} as asked: {plans[0].reason.removeprefix('is refused: ')}")
    budget, context = least.budget_bytes, least.predicted.context_bytes
    if least.predicted.peak_bytes + context <= budget:  # it is not the memory of the device
        return TightfitError(f"nothing runs {spec.name} at {asked} as asked: it {least.reason}")
    if hardware.device == "cpu" and hardware.providers is None and context >= PROCESS:
        context = max(context, process_context())  # planning has made this process larger, and whoever detects next counts that
    needed, cures, joint = least.predicted.peak_bytes + context, [], ", or "
    if least.predicted.context_bytes >= budget:
        cures.append(f"{_holder(hardware)} alone takes {shown(context)}")
        joint = ", and "
    elif smaller := _largest_of_this_shape(hardware, spec, request, wishes, plans):
        cures.append(f"the largest of this shape that fits is {smaller}")
    cures.append(
        f"{asked} needs {_option(hardware)} {-(-needed // 2**20)}MiB"
        if needed <= hardware.free_bytes
        else f"{asked} needs {shown(needed)} free, {shown(hardware.free_bytes)} are{_limit(hardware)}"
    )
    return TightfitError(f"{spec.name} does not fit {shown(budget)}: {joint.join(cures)} (with {least.summary()})")


def refuse_hopeless(hardware: Hardware, spec: ModelSpec, request: Request, wishes: Wishes) -> None:
    """Raise TightfitError for what no way of running can fit, found out without following all of them: where there is no room
    beside the context, or none for one feature map of the picture. Following how 16384x16384 runs takes minutes."""
    request, budget = request.resolve(spec), _budget(hardware, wishes)
    room = budget - hardware.context_bytes
    if room > 0 and _largest_map(hardware, spec, int(request.width or 0), int(request.height or 0)) <= room:
        return
    if room <= 0:
        few = _frugal(spec, request, wishes)
        raise none_fits(plan(hardware, spec, request, few), hardware, spec, request, wishes)
    native = replace(request, width=spec.native_size[1], height=spec.native_size[0])
    plans = plan(hardware, spec, native, _frugal(spec, native, wishes))
    runs = [p for p in plans if p.fits or p.reason.startswith(_NEEDS)]
    if not runs:
        raise none_fits(plans, hardware, spec, request, wishes)
    smaller = _largest_of_this_shape(hardware, spec, request, wishes, runs)
    cure = f"the largest of this shape that fits is {smaller}" if smaller else "no size of this shape fits"
    most = _largest_map(hardware, spec, int(request.width or 0), int(request.height or 0))
    raise TightfitError(
        f"{spec.name} does not fit {shown(budget)}: one feature map of {request.width}x{request.height} takes {shown(most)}, {cure}"
    )


def _frugal(spec: ModelSpec, request: Request, wishes: Wishes) -> Wishes:
    """Wishes for the ways that take little memory, where they are torch's: half as many calls are followed for these."""
    if any(component.graph for component in spec.components.values()):
        return wishes
    least: dict[str, str] = {"tiling": "tiled"}
    if guided(spec, request):
        least["cfg"] = "sequential"
    return replace(wishes, **{name: value for name, value in least.items() if getattr(wishes, name) == "auto"})


def _budget(hardware: Hardware, wishes: Wishes) -> int:
    return hardware.free_bytes if wishes.budget is None else min(wishes.budget, hardware.free_bytes)


def _limit(hardware: Hardware) -> str:
    bounded = hardware.device == "cpu" and hardware.providers is None and address_space() < math.inf
    return f" under this process's limit of {shown(address_space())} (ulimit -v)" if bounded else ""


def _option(hardware: Hardware) -> str:
    return "--ram" if hardware.device == "cpu" else "--vram"


def _holder(hardware: Hardware) -> str:
    return "the process" if hardware.device == "cpu" else "the device's context"


def _largest_map(hardware: Hardware, spec: ModelSpec, width: int, height: int) -> int:
    """Bytes, in 16 bits, of the widest map that the U-Net or the VAE has of a whole picture, however it runs."""
    if hardware.device != "cpu" and any(component.graph for component in spec.components.values()):
        return 0  # it may run on the CPU beside
    pixels = width * height
    latent_pixels = pixels // spec.downsampling**2
    return 2 * max(pixels * spec.vae["block_out_channels"][0], latent_pixels * spec.unet["block_out_channels"][0])


def _largest_of_this_shape(
    hardware: Hardware, spec: ModelSpec, request: Request, wishes: Wishes, plans: Sequence[Plan]
) -> str | None:
    """By the way of running that takes the least memory at the size asked for; or by the least that streams, as of a small picture
    it is the weights that take memory."""
    runs = sorted((p for p in plans if p.fits or p.reason.startswith(_NEEDS)), key=lambda p: p.predicted.peak_bytes)
    ways = [*runs[:1], *[p for p in runs[1:] if p.placements["unet"].residency == "streamed"][:1]]
    found = (_largest_that_fits(hardware, spec, request, wishes, way) for way in ways)
    return next(filter(None, found), None)


def _largest_that_fits(hardware: Hardware, spec: ModelSpec, request: Request, wishes: Wishes, least: Plan) -> str | None:
    """The largest size of the request's shape that runs as `least` does."""
    width, height, step = int(request.width or 0), int(request.height or 0), spec.downsampling * 8
    shorter, budget = min(width, height), _budget(hardware, wishes)
    sizes = [(round(width * side / shorter / step) * step, round(height * side / shorter / step) * step)
             for side in range(step, shorter, step)]  # fmt: skip
    sizes = [size for size in sizes if hardware.context_bytes + _largest_map(hardware, spec, *size) <= budget]
    low, high, best = 0, len(sizes) - 1, None
    with _cycles_left():
        while low <= high:  # the sizes grow
            middle = (low + high) // 2
            smaller = replace(request, width=sizes[middle][0], height=sizes[middle][1])
            if _job(hardware, spec, smaller, wishes).plan(least.cfg, least.placements, budget).fits:
                best, low = f"{sizes[middle][0]}x{sizes[middle][1]}", middle + 1
            else:
                high = middle - 1
    return best


def _candidates(
    hardware: Hardware, spec: ModelSpec, request: Request, wishes: Wishes
) -> Iterator[tuple[str, dict[str, Placement]]]:
    modes = _options(wishes.cfg, CFG) if guided(spec, request) else ("batched",)
    seen = set()
    for engines in _engines(spec, wishes):
        graph = spec.components["unet"].graph if engines["unet"] == "onnx" else None
        tiled = graph is None or engines["vae_decoder"] == "torch"
        axes = (
            _of_graph(spec, wishes) if graph else _precisions(hardware, spec, wishes),
            _options(wishes.residency, RESIDENCIES if graph is None else RESIDENCIES[:2]),
            _options(wishes.attention, ATTENTIONS if tiled else ATTENTIONS[:1]),
            _options(wishes.tiling, TILINGS if tiled else TILINGS[:1]),
            modes,
        )
        for (precision, compute), residency, attention, tiling, cfg in product(*axes):
            choice = {"residency": residency, "attention": attention, "tiling": tiling}
            placements = {
                name: _on_onnx(hardware, spec, name, wishes, choice)
                if engine == "onnx"
                else _on_torch(hardware, spec, name, (precision, compute), choice)
                for name, engine in engines.items()
            }
            key = (cfg, *placements.values())
            if key not in seen:
                seen.add(key)
                yield cfg, placements


def _options(asked: str, known: Sequence[str]) -> Sequence[str]:
    return known if asked == "auto" else (asked,)


def _engines(spec: ModelSpec, wishes: Wishes) -> Iterator[dict[str, str]]:
    """Which engine runs each component, of those that can read it; the text encoders are run by one."""
    there = {name: _runnable(spec, component) for name, component in spec.components.items()}
    asked = wishes.backend if wishes.backend != "auto" else "onnx" if wishes.provider != "auto" else None
    if asked and not any(asked in engines for engines in there.values()):
        how = "export it with --to onnx" if asked == "onnx" else f"use {spec.source or 'the model'}, from which it was exported"
        if why := next((component.unreadable for component in spec.components.values() if component.unreadable), ""):
            how = f"{why}; or {how}"
        option = "--backend" if wishes.backend != "auto" else "--provider"
        raise TightfitError(f"{spec.name} has no weights that {asked} reads: {how}, or leave out {option}")
    of_kind: dict[str, tuple[str, ...]] = {}
    for name, engines in there.items():
        kind, own = name.removesuffix("_2"), (asked,) if asked and asked in engines else engines
        of_kind[kind] = tuple(each for each in of_kind.get(kind, own) if each in own) or own
    for chosen in product(*of_kind.values()):
        by_kind = dict(zip(of_kind, chosen, strict=True))
        picked = {name: by_kind[name.removesuffix("_2")] for name in there}
        yield {name: engine if engine in there[name] else there[name][0] for name, engine in picked.items()}


def _runnable(spec: ModelSpec, component: Component) -> tuple[str, ...]:
    """The engines that can run a component; a graph that ONNX Runtime cannot is passed over where torch has weights too."""
    if "onnx" not in component.engines:
        return component.engines
    try:
        engine("onnx").check(spec, component)
    except TightfitError:
        if not component.tensors:
            raise
        return ("torch",)
    return component.engines


def _on_torch(hardware: Hardware, spec: ModelSpec, name: str, kind: tuple[str, str], choice: Mapping[str, str]) -> Placement:
    vae, (precision, compute) = name == "vae_decoder", kind
    if precision == DYNAMIC and name != "unet":
        precision = "int8"  # a strip of a VAE would have another scale than the next; text encoders have little to gain
    computes = _vae_compute(hardware, spec, compute) if vae else compute
    return Placement(
        "torch",
        precision if precision in QUANTISED else computes,
        computes,
        # a VAE is a hundredth of a U-Net: nothing to gain
        "staged" if vae and choice["residency"] == "streamed" else choice["residency"],
        choice["attention"] if name in ("unet", "vae_decoder") else "sdpa",
        choice["tiling"] if vae else "whole",
    )


def _on_onnx(hardware: Hardware, spec: ModelSpec, name: str, wishes: Wishes, choice: Mapping[str, str]) -> Placement:
    graph = spec.components[name].graph
    assert graph
    own = name == "unet"  # what is asked for is of the U-Net; the engine says that it cannot stream, or slice
    return Placement(
        "onnx",
        graph.precision,
        graph.compute,
        choice["residency"] if own or choice["residency"] != "streamed" else "staged",
        choice["attention"] if own else "sdpa",
        choice["tiling"] if name == "vae_decoder" and wishes.tiling != "auto" else "whole",
        _provider(hardware, wishes.provider),
    )


def _provider(hardware: Hardware, asked: str) -> str:
    """The execution provider that is asked for, by its name or the start of that; or the best that is here."""
    there = hardware.onnx_providers()
    if asked == "auto":
        return next((each for each in PROVIDERS[hardware.device] if each in there), CPU_PROVIDER)
    known = {provider_name(each): each for names in PROVIDERS.values() for each in names}  # none that sends the model elsewhere
    short = provider_name(asked).replace("directml", "dml")
    if known.get(short) not in there:
        usable = ", ".join(name for name, each in known.items() if each in there)
        cure = f"choose {usable}" if usable else "it is not installed, pip install 'tightfit[cpu]' or [gpu]"
        if hardware.providers is None and (why := provider_problems().get(known.get(short, ""))):
            raise TightfitError(f"ONNX Runtime's provider '{asked}' does not run here ({why}): {cure}")
        if short in map(provider_name, there):
            raise TightfitError(f"tightfit does not run on ONNX Runtime's provider '{asked}': {cure}")
        fits = hardware.providers is None and known.get(short) in PROVIDERS[hardware.device]  # this machine, and its kind of device
        if usable and fits and short in PACKAGES and (short != "dml" or sys.platform == "win32"):
            cure = f"pip install onnxruntime-{PACKAGES[short]} in place of onnxruntime, or {cure}"
        raise TightfitError(f"ONNX Runtime has no provider '{asked}' for {hardware.name}: {cure}")
    return known[short]


def _of_graph(spec: ModelSpec, wishes: Wishes) -> list[tuple[str, str]]:
    """The one way that the U-Net's graph has its weights, if that is what is asked for."""
    unet, origin = spec.components["unet"], spec.source or "the model"
    graph = unet.graph
    assert graph
    for name, asked, has in (("precision", wishes.precision, graph.precision), ("compute", wishes.compute, graph.compute)):
        if asked not in ("auto", has):
            if wishes.backend == "auto" and unet.tensors:
                return []  # torch can do it
            again = f"use {origin}, from which it was exported"
            if asked in ("fp32", "fp16", *STORED):
                options = f"{graph.precision} --compute {asked}" if name == "compute" and graph.precision in STORED else asked
                again = f"export {origin} with --to onnx --precision {options}"
            raise TightfitError(f"{graph.file} has {name} {has}, not {asked}: choose --{name} auto, or {again}")
    return [(graph.precision, graph.compute)]


def _precisions(hardware: Hardware, spec: ModelSpec, wishes: Wishes) -> list[tuple[str, str]]:
    """What weights may be held in, and what is computed in: quantised ones in what the device prefers, unless told."""
    known: tuple[str, ...] = (*hardware.precisions, *QUANTISED)
    if spec.precision:
        known = _of_stored(spec.precision)
        if wishes.precision not in ("auto", *known):
            raise TightfitError(
                f"{spec.name} is stored in {spec.precision}: leave out --precision {wishes.precision}, or use the original"
            )
    found = []
    if hardware.device != "cpu" or "int8" not in hardware.rates:  # on GPUs its kernels are yet to be timed: when asked for
        known = tuple(each for each in known if each != DYNAMIC)
    for precision in known if wishes.precision == "auto" else (wishes.precision,):
        own = hardware.precisions[0] if precision in QUANTISED else precision
        compute = own if wishes.compute == "auto" else wishes.compute
        if precision in (*QUANTISED, compute):
            found.append((precision, compute))
    return found


def _of_stored(precision: str) -> tuple[str, ...]:
    """What a model that is stored in int8 or int4 can run in."""
    return (precision, DYNAMIC) if precision == "int8" else (precision,)


def _vae_compute(hardware: Hardware, spec: ModelSpec, precision: str) -> str:
    """SDXL's VAE overflows in fp16, unless it is one that was published with force_upcast off."""
    if precision == "fp16" and spec.family == "sdxl" and spec.vae.get("force_upcast", True):
        return "bf16" if "bf16" in hardware.precisions else "fp32"
    return precision


def guided(spec: ModelSpec, request: Request) -> bool:
    """Classifier-free guidance: asked for above one, as in diffusers, but not of models distilled for it."""
    return (request.guidance_scale or 0) > 1 and not spec.guidance_width


_costs: Recent[dict[Any, Any]] = Recent(4)


def _job(hardware: Hardware, spec: ModelSpec, request: Request, wishes: Wishes) -> _Job:
    """One that remembers what an earlier one of the same machine, model and size computed."""
    key = (request.width, request.height, guided(spec, request))
    return _Job(hardware, spec, request, wishes, _costs.get(key, dict, hardware, spec))


@dataclass(frozen=True)
class _Job:
    """One request on one machine, and what it costs to run it in one way or another."""

    hardware: Hardware
    spec: ModelSpec
    request: Request
    wishes: Wishes
    _known: dict[Any, Any]

    def plan(self, cfg: str, placements: Mapping[str, Placement], budget: int) -> Plan:
        predicted = self._predict(cfg, placements)
        problem = self._problem(cfg, placements, predicted, budget)
        reason = problem or "fits"
        return Plan(
            self.spec.name, self.hardware.name, self.hardware.device, budget, cfg, placements, predicted, not problem, False, reason
        )

    def plans(self, cfg: str, placements: Mapping[str, Placement], budget: int) -> Iterator[Plan]:
        """This way of running; and of weights that stream with as many kept loaded as the budget has room for, and half of them."""
        one = self.plan(cfg, placements, budget)
        yield one
        room = budget - one.predicted.context_bytes
        # who asks for streaming, and names no budget, wants the least memory
        may_keep = self.wishes.residency == "auto" or self.wishes.budget is not None
        streams = placements["unet"].residency == "streamed" and not self._refused(cfg, placements)
        if not streams or not may_keep or one.predicted.peak_bytes > room:
            return
        room = int(room * (1 - SLACK))
        filled = {name: self._filled(name, placement, cfg, placements, room) for name, placement in placements.items()}
        most = filled["unet"].kept_bytes
        sums = accumulate(self._footprint("unet", placements["unet"], cfg).units)
        half = max((kept for kept in sums if kept <= most / 2), default=0)
        for kept in {most, half} - {0}:
            yield self.plan(cfg, filled | {"unet": replace(filled["unet"], kept_bytes=kept)}, budget)

    def _filled(self, name: str, own: Placement, cfg: str, placements: Mapping[str, Placement], room: int) -> Placement:
        """With as much kept loaded as goes into `room` bytes. Where that is all, a text encoder is staged. A U-Net is left alone,
        as staging it is another candidate, or, if streaming is asked for, streams its smallest unit."""
        if own.residency != "streamed":
            return own
        units = self._footprint(name, own, cfg).units
        spare = room - self._peak(name, cfg, placements) + 2 * units[0]  # the buffer becomes smaller
        count = bisect_right(list(accumulate(units)), spare)
        if count == len(units) and name == "unet":
            if self.wishes.residency == "auto":
                return own
            count -= 1
        while count:
            kept = replace(own, kept_bytes=sum(units[:count]))
            over = self._peak(name, cfg, {**placements, name: kept}) - room
            if over <= 0:
                return kept if count < len(units) else replace(own, residency="staged")
            while count and over > 0:
                count -= 1
                over -= units[count]
        return own

    def _once(self, key: Any, compute: Callable[[], T]) -> T:
        """Candidates share most of what they are made of."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def _footprint(self, name: str, placement: Placement, cfg: str) -> Footprint:
        run, size = engine(placement.backend).footprint, self._size(name, cfg)
        return self._once(
            (name, placement, size), lambda: run(self.spec, self.spec.components[name], placement, self.hardware, size)
        )

    def _size(self, name: str, cfg: str) -> tuple[int, int, int]:
        """The batch that a component is called with, and the picture's height and width."""
        both = 2 if name == "unet" and guided(self.spec, self.request) and cfg == "batched" else 1
        return both, int(self.request.height or 0), int(self.request.width or 0)

    def _predict(self, cfg: str, placements: Mapping[str, Placement]) -> Predicted:
        footprints = {name: self._footprint(name, placement, cfg) for name, placement in placements.items()}
        stages: dict[str, int] = dict.fromkeys(STAGES, 0)
        for name in placements:
            stage = "denoise" if name == "unet" else "decode" if name == "vae_decoder" else "encode"
            stages[stage] = max(stages[stage], self._peak(name, cfg, placements))
        # What is staged takes of the host one after another; what is pinned to stream from stays for the next picture.
        staged = [footprints[n].host for n, placement in placements.items() if placement.residency == "staged"]
        host = sum(each.host for each in footprints.values()) - sum(staged) + max(staged, default=0)
        seconds = self._seconds(cfg, placements, footprints)
        psnr = min(_psnr(placement) for placement in placements.values())
        return Predicted(max(stages.values()), stages, self.hardware.context_bytes, host, seconds, psnr)

    def _peak(self, name: str, cfg: str, placements: Mapping[str, Placement]) -> int:
        """While one component is called, beside those that stay loaded."""
        own, names = placements[name], list(placements)
        others = [n for n, placement in placements.items() if placement.residency == "resident" and n != name]
        first = [n for n in others if own.residency != "resident" or names.index(n) < names.index(name)]  # loaded before it
        groups = (first, [n for n in others if n not in first])

        def compute() -> int:
            footprint = {n: self._footprint(n, placements[n], cfg) for n in (name, *others)}
            held, later = ([count for n in group for count in (*footprint[n].held, footprint[n].kept)] for group in groups)
            return peak(self.hardware.device, [*self.hardware.workspaces, *held], footprint[name], later)

        beside = tuple((n, p.backend, p.provider, p.precision, p.compute) for n in others for p in [placements[n]])
        return self._once(("peak", name, own, beside, cfg), compute)

    def _seconds(self, cfg: str, placements: Mapping[str, Placement], footprints: Mapping[str, Footprint]) -> float:
        both = 2 if guided(self.spec, self.request) else 1
        total = 0.0
        for name, placement in placements.items():
            calls = both  # texts are encoded one by one
            if name == "unet":
                one_picture = schedulers.calls(str(self.request.scheduler), self.spec, int(self.request.num_inference_steps or 0))
                calls = one_picture * (both if cfg == "sequential" else 1) * self.request.num_images
            elif name == "vae_decoder":
                calls = self.request.num_images
            one = ("seconds", name, placement, cfg)
            total += calls * self._once(one, lambda p=placement, n=name: call_seconds(self.hardware, p, footprints[n]))
            total += self._loading_seconds(self.spec.components[name], placement, footprints[name])
        return total

    def _loading_seconds(self, component: Component, placement: Placement, footprint: Footprint) -> float:
        """For one request. What stays loaded, or pinned, is read once for all of them."""
        if placement.residency == "streamed":
            kept, pinned = component.stored_bytes - footprint.stored, footprint.host
            once = footprint.stored / self.hardware.read + pinned * PIN_SECONDS if pinned else 0.0
            return kept / self.hardware.read + once / self.wishes.requests
        loading = self._reading_seconds(component, placement)
        return loading / (self.wishes.requests if placement.residency == "resident" else 1)

    def _reading_seconds(self, component: Component, placement: Placement) -> float:
        if placement.backend == "onnx":
            assert component.graph
            return component.graph.stored_bytes / self.hardware.read + SESSION_SECONDS * len(component.graph.model.graph.node)
        loading = component.stored_bytes / self.hardware.read
        count = sum(t.count for t in component.tensors.values())
        if placement.precision in QUANTISED and component.formats is None:
            loading += count * QUANTISE_SECONDS[placement.precision]
        if placement.precision == DYNAMIC and self.hardware.device == "cpu":
            loading += count * PACK_SECONDS
        return loading

    def _refused(self, cfg: str, placements: Mapping[str, Placement]) -> str | None:
        """Why an engine cannot run its component so, or None."""
        for name, placement in placements.items():
            component = self.spec.components[name]
            why = engine(placement.backend).refuses(self.spec, component, placement, self.hardware, self._size(name, cfg))
            if why:
                return why
        return None

    def _problem(self, cfg: str, placements: Mapping[str, Placement], predicted: Predicted, budget: int) -> str | None:
        """Why this plan cannot be taken, or None."""
        if refusal := self._refused(cfg, placements):
            return f"is refused: {refusal}"
        if self.wishes.min_psnr is not None and predicted.psnr < self.wishes.min_psnr:
            return f"is {predicted.psnr:.0f} dB from fp32, below the floor of {self.wishes.min_psnr:g}"
        room = budget - predicted.context_bytes
        if predicted.peak_bytes > room:
            stage = max(predicted.stages, key=lambda name: predicted.stages[name])
            beside = f" beside the {shown(predicted.context_bytes)} of {_holder(self.hardware)}" if room <= 0 else ""
            most = predicted.stages[stage]
            return f"{_NEEDS} {shown(most)} to {stage}{beside}, {shown(most - room)} too much"
        if predicted.host_bytes > self.hardware.host_bytes:
            return f"{_NEEDS} {shown(predicted.host_bytes)} of the host's memory, {shown(self.hardware.host_bytes)} are free"
        return None


def _psnr(placement: Placement) -> float:
    """Errors of weights and of arithmetic add up, as independent noise does."""
    if placement.precision == placement.compute:
        return PSNR[placement.precision]
    return -10 * math.log10(sum(10 ** (-PSNR[each] / 10) for each in (placement.precision, placement.compute)))


def _burden(plan: Plan) -> tuple[float, ...]:
    """By what to choose among plans that are as fast: quality, then doing nothing that need not be, then memory."""
    streamed = any(placement.residency == "streamed" for placement in plan.placements.values())
    return -plan.predicted.psnr, streamed, plan.cfg == "sequential", plan.predicted.peak_bytes, plan.predicted.seconds


def _praise(best: Plan, wishes: Wishes, hardware: Hardware) -> str:
    forced = [
        getattr(wishes, name) for name in ("backend", "provider", "precision", "compute", "residency", "attention", "tiling", "cfg")
    ]
    asked = [choice for choice in forced if choice != "auto"]
    left = best.budget_bytes - best.predicted.context_bytes - best.predicted.peak_bytes
    slow = (
        ""
        if best.placements["unet"].compute in hardware.precisions
        else f"; {hardware.name} has no arithmetic for {best.placements['unet'].compute}, expect it to be slow"
    )
    by = f" ({', '.join(asked)} asked for)" if asked else ""
    if wishes.residency == "streamed" and wishes.budget is None:
        by += f"; nothing is kept loaded, {'--ram' if hardware.device == 'cpu' else '--vram'} BYTES keeps what it allows"
    return f"the fastest that fits, with {shown(left)} to spare{by}{slow}"


def _beaten(plan: Plan, best: Plan) -> Plan:
    """With the reason why it was not taken though it fits."""
    ratio = plan.predicted.seconds / best.predicted.seconds
    more = plan.predicted.peak_bytes - best.predicted.peak_bytes
    if 1 + _SAME < ratio < 1.005:
        reason = "fits, hardly slower"
    elif ratio > 1 + _SAME:
        reason = f"fits, but is {ratio:.2f} times as slow"
    elif more > 0:
        reason = f"fits, as fast, but takes {shown(more)} more"
    else:
        reason = "fits, no better"
    return replace(plan, reason=reason)
