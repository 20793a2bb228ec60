"""What one way of running a request costs: bytes, seconds, decibels."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from typing import Any, TypeVar

from ...kernels.recipe import bits_of, recipe
from ..backends import engine, graph_engine
from ..budget import BUILDING
from ..costs.footprint import NO_CALL, Footprint, peak
from ..costs.latency import (
    PACK_SECONDS,
    PICTURE_SECONDS,
    PIN_SECONDS,
    PIXEL_SECONDS,
    STEP_SECONDS,
    call_seconds,
    compiling_seconds,
    converted_values,
    filling_seconds,
    quantising_seconds,
    read_bytes,
    reading_seconds,
)
from ..machine.hardware import Hardware
from ..models.families.family import CACHES, FULL, KEPT, SHALLOW, STEPPING, Extent, Role
from ..models.spec import Component, ModelSpec
from ..models.tensors import Tensor
from ..placement import DYNAMIC, GRAPHS, QUANTISED, STAGES, STORED, Placement
from ..recent import Recent
from ..request import Job
from ..texts import TEXTS, Known, arithmetic
from ..units import shown
from .plan import Plan, Predicted, Verdict, refused
from .wishes import Wishes

# Decibels of PSNR against the fp32 picture of the same seed, the worst of 24 of emoji's (python -m
# tightfit.benchmarks.quality). Of int8 and int4, what rounding the weights costs; what they compute in comes
# on top.
# Of packed fp32 a cautious guess: one call of SD 1.5 is 129 dB from plain.
PSNR = {
    "fp32": 99.0,
    "packed": 90.0,
    "fp16": 60.0,
    "bf16": 49.0,
    "int8": 51.0,
    "int8-dynamic": 46.0,
    "int4": 33.0,
}
# Of the budget, left free where weights are kept loaded to fill it: predictions were 4.1 % off at most
# (benchmarks/predicted.py).
SLACK = 0.04
# The same of cached steps, beside all in full: the worst of eight pictures by DPM++ 2M Karras and by DDIM, by
# the steps of which one is taken in full, and the count of steps (benchmarks/cache.py).
CACHED_PSNR = {
    2: {4: 7.9, 6: 21.5, 8: 33.6, 10: 43.5, 15: 53.6, 25: 56.0, 50: 58.1},
    3: {4: 7.9, 6: 21.5, 8: 28.1, 10: 38.3, 15: 48.9, 25: 51.9, 50: 56.1},
    5: {4: 7.9, 6: 20.3, 8: 28.1, 10: 29.3, 15: 38.1, 25: 46.0, 50: 51.8},
    10: {4: 7.9, 6: 20.3, 8: 25.2, 10: 23.9, 15: 27.7, 25: 37.5, 50: 44.4},
}
# The worst of four pictures that a second, larger pass goes on from (DDIM, every second of 25 steps in full).
CACHED_BEFORE_HIRES_PSNR = 35.1
_BRANCHING = Role.DENOISER, Role.CONTROL  # called for each branch of each picture
T = TypeVar("T")


def cached_psnr(every: int, steps: int) -> float:
    """Decibels where one of `every` steps is taken in full: those of the next larger number in CACHED_PSNR,
    and between two counts of steps by their logarithms."""
    known = CACHED_PSNR[min(each for each in CACHED_PSNR if each >= every)]
    count = min(max(steps, min(known)), max(known))
    below, above = max(each for each in known if each <= count), min(each for each in known if each >= count)
    share = math.log(count / below, above / below) if above > below else 0.0
    return known[below] + share * (known[above] - known[below])


def caching_psnr(every: int, job: Job) -> float:
    """The same of a job, whose picture a larger pass may go on from."""
    known = cached_psnr(every, job.steps_taken)
    return min(known, CACHED_BEFORE_HIRES_PSNR) if job.whole.is_enlarged else known


def holder(hardware: Hardware) -> str:
    return "the process" if hardware.device == "cpu" else "the device's context"


class Estimator:
    """Costs every request of this process. Requests for the same machine, model and size share what was
    computed.

    Threads take turns (BUILDING): calls are followed on `meta` modules that all requests share.
    """

    def __init__(self, most: int = 4) -> None:
        """Keeps the costs of the last `most` machines, models and sizes."""
        self.costs: Recent[dict[Any, Any]] = Recent(most)

    def estimate(self, hardware: Hardware, job: Job, wishes: Wishes) -> Estimate:
        key = (job.width, job.height, job.branches, job.prompting.chunks, *job.sides.items(), *job.references)
        step_cache = job.step_cache or wishes.cache_every or 1
        known = self.costs.get(key, dict, hardware, job.spec)
        texts = TEXTS.known(job, hardware)
        return Estimate(hardware, job, wishes, known, step_cache=step_cache, texts=texts)


ESTIMATOR = Estimator()  # the one of this process


@dataclass(frozen=True)
class Estimate:
    """One job on one machine, and what it costs to run it in one way or another. `texts`: in which
    arithmetics its texts are known. `texts_known`: no text encoder is loaded for them."""

    hardware: Hardware
    job: Job
    wishes: Wishes
    _known: dict[Any, Any]
    images_per_call: int = 1
    images_per_decode: int = 1
    step_cache: int = 1
    texts: Known = frozenset()
    texts_known: bool = False

    @property
    def spec(self) -> ModelSpec:
        return self.job.spec

    def plan(self, cfg: str, placements: Mapping[str, Placement], budget_bytes: int) -> Plan:
        with BUILDING:
            predicted = self._predict(cfg, placements)
            verdict, reason = self._verdict(cfg, placements, predicted, budget_bytes)
        return Plan(
            model=self.spec.name,
            hardware=self.hardware.name,
            device=self.hardware.device,
            budget_bytes=budget_bytes,
            cfg=cfg,
            placements=placements,
            predicted=predicted,
            verdict=verdict,
            chosen=False,
            reason=reason,
            images_per_call=self.images_per_call,
            images_per_decode=self.images_per_decode,
            step_cache=self.step_cache,
            texts_known=self.texts_known,
            guided=self.job.branches > 1,
        )

    def of(self, plan: Plan) -> Estimate:
        """What it costs with as many pictures a call, and steps cached, as that plan has."""
        return replace(
            self,
            images_per_call=plan.images_per_call,
            images_per_decode=plan.images_per_decode,
            step_cache=plan.step_cache,
        )

    def best(self, cfg: str, placements: Mapping[str, Placement], budget_bytes: int) -> Plan:
        """Without the text encoders, if that goes."""
        plan = self.plan(cfg, placements, budget_bytes)
        return self.knowing(plan) or plan

    def knowing(self, plan: Plan) -> Plan | None:
        """The same without the text encoders, where all texts are known, and if it fits. Those that stay
        loaded are for other requests too, so they are left out only where they do not fit."""
        if not self.texts:
            return None
        encoders = {name: own for name, own in plan.placements.items() if self._role(name) is Role.TEXT}
        stays = plan.fits and any(own.residency == "resident" for own in encoders.values())
        if stays or not {(name, arithmetic(own)) for name, own in encoders.items()} <= self.texts:
            return None
        own = replace(self.of(plan), texts_known=True)
        known = own.plan(plan.cfg, plan.placements, plan.budget_bytes)
        return known if known.fits else None

    def plans(self, cfg: str, placements: Mapping[str, Placement], budget_bytes: int) -> list[Plan]:
        """This way of running. Where its weights stream, also with as many kept loaded as the budget has room
        for, and with half of those."""
        plan = self.plan(cfg, placements, budget_bytes)
        room = budget_bytes - plan.predicted.context_bytes
        if plan.predicted.peak_bytes > room or not self._may_keep(cfg, placements):
            return [plan]
        return [plan, *(self.plan(cfg, kept, budget_bytes) for kept in self._keeping(cfg, placements, room))]

    def _may_keep(self, cfg: str, placements: Mapping[str, Placement]) -> bool:
        if placements[self.spec.denoiser.name].residency != "streamed":
            return False
        # who asks for streaming, and names no budget, wants the least memory
        wanted = self.wishes.residency == "auto" or self.wishes.budget is not None
        return wanted and not self.refusal(cfg, placements)

    def _keeping(
        self, cfg: str, placements: Mapping[str, Placement], room: int
    ) -> list[dict[str, Placement]]:
        """What streams, with weights kept loaded in `room` bytes but for the slack, and with half of
        these."""
        room = int(room * (1 - SLACK))
        filled, denoiser = dict(placements), self.spec.denoiser.name
        for name in sorted(
            self._needed(placements), key=lambda name: name != denoiser
        ):  # what it leaves is for the others
            filled[name] = self._filled(name, placements[name], cfg, filled, room)
        if filled[denoiser].residency == "staged":  # as all are in another candidate
            return [filled] if any(own.residency == "streamed" for own in filled.values()) else []
        most = filled[denoiser].kept_bytes
        sums = accumulate(self._footprint(denoiser, placements[denoiser], cfg).units)
        half = max((kept for kept in sums if kept <= most / 2), default=0)
        return [
            filled | {denoiser: replace(filled[denoiser], kept_bytes=kept)} for kept in {most, half} - {0}
        ]

    def _filled(
        self, name: str, own: Placement, cfg: str, placements: Mapping[str, Placement], room: int
    ) -> Placement:
        """With as much kept loaded as goes into `room` bytes. Where that is all, it is staged; a denoiser
        streams its smallest unit then, if streaming is asked for."""
        if own.residency != "streamed":
            return own
        units = self._footprint(name, own, cfg).units
        spare = room - self._most(name, cfg, placements) + 2 * units[0]  # the buffer becomes smaller
        count = bisect_right(list(accumulate(units)), spare)
        if count == len(units) and self._role(name) is Role.DENOISER:
            if self.wishes.residency == "auto":
                return replace(own, residency="staged")
            count -= 1
        while count:
            kept = replace(own, kept_bytes=sum(units[:count]))
            over = self._most(name, cfg, {**placements, name: kept}) - room
            if over <= 0:
                return kept if count < len(units) else replace(own, residency="staged")
            while count and over > 0:
                count -= 1
                over -= units[count]
        return own

    def _most(self, name: str, cfg: str, placements: Mapping[str, Placement]) -> int:
        """While one component is called, or previews are decoded beside it."""
        beside = [n for n in placements if self._role(n) is Role.PREVIEW]
        names = (name, *beside) if self._role(name) in STEPPING else (name,)
        return max(self._peak(n, cfg, placements) for n in names)

    def _once(self, key: Any, compute: Callable[[], T]) -> T:
        """Candidates share most of what they are made of."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def _role(self, name: str) -> Role:
        return self.spec.components[name].role

    def _footprint(self, name: str, placement: Placement, cfg: str, cache: str = FULL) -> Footprint:
        run, extent = engine(placement.backend).footprint, self._extent(name, cfg, cache)
        return self._once(
            (name, placement, extent),
            lambda: run(self.spec, self.spec.components[name], placement, self.hardware, extent),
        )

    def _extent(self, name: str, cfg: str, cache: str = FULL) -> Extent:
        """What a component is called for; `cache` says how, where it caches steps."""
        role, job = self._role(name), self.job
        rows = job.branches if role in _BRANCHING and cfg == "batched" else 1
        height, width = job.sides.get(name, (job.height, job.width))
        whole = cache == FULL and role is Role.CONTROL
        cached = cache if self._caches(name) and not whole else ""
        references = job.references if role in _BRANCHING else ()
        return Extent(rows * self._pictures(role), height, width, job.prompting.chunks, cached, references)

    def _pictures(self, role: Role) -> int:
        """That go through a network of such a role at once."""
        if role is Role.DECODER:
            return self.images_per_decode
        return self.images_per_call if role in _BRANCHING else 1

    def _caches(self, name: str) -> bool:
        """Whether it is called in two ways, as it caches steps."""
        return self.step_cache > 1 and self.spec.components[name].network.call_cached is not None

    def _predict(self, cfg: str, placements: Mapping[str, Placement]) -> Predicted:
        needed = self._needed(placements)
        footprints = {name: self._footprint(name, placement, cfg) for name, placement in needed.items()}
        stages: dict[str, int] = dict.fromkeys(STAGES, 0)
        for name in self._called(placements):
            stage = self._role(name).stage
            stages[stage] = max(stages[stage], self._peak(name, cfg, placements))
        painting = self._calling_seconds(cfg, placements)
        reading, quantising = self._preparing_seconds(placements, footprints)
        compiling = self._compiling_seconds(cfg, placements)
        return Predicted(
            peak_bytes=max(stages.values()),
            stages=stages,
            context_bytes=self.hardware.context_bytes,
            host_bytes=_host_bytes(needed, footprints),
            seconds=painting + reading + quantising + compiling,
            psnr=self._quality(placements),
            reading_seconds=reading,
            quantising_seconds=quantising,
            compiling_seconds=compiling,
        )

    def _quality(self, placements: Mapping[str, Placement]) -> float:
        """Of the least exact network, and of steps that are cached: errors that add up."""
        worst = min(_psnr(self.spec.components[name], placement) for name, placement in placements.items())
        if self.step_cache == 1:
            return worst
        return _summed([worst, caching_psnr(self.step_cache, self.job)])

    def _peak(self, name: str, cfg: str, placements: Mapping[str, Placement]) -> int:
        """While one component is called, beside those that stay loaded, or are called in turn with it."""
        own, names = placements[name], list(placements)
        in_turn = {n for n in names if {self._role(n), self._role(name)} <= STEPPING}
        stay = filter(self._is_loaded, (n for n in names if placements[n].residency == "resident"))
        resident = {*stay}
        others = [n for n in names if n in resident | in_turn and n != name]
        # Loaded before it.
        before = {n for n in others if names.index(n) < names.index(name)}
        first = [n for n in others if n in (before if own.residency == "resident" else before | resident)]
        # A refiner is loaded for one request, so that what is loaded after this is not there yet.
        is_new = self.job.model is not self.job.whole.model
        groups = (first, [] if is_new else [n for n in others if n not in first])
        features = self._features(name, placements, cfg)

        def compute() -> int:
            footprint = {n: self._footprint(n, placements[n], cfg) for n in (name, *others)}
            held, later = (
                [count for n in group for count in (*footprint[n].held, *self._kept(n, placements[n], cfg))]
                for group in groups
            )
            ways = [footprint[name]]
            if own.captured:
                # Each kind of call runs as it is once, but its graph takes as much then, and more.
                later += self._kept(name, own, cfg)
                ways = [replace(footprint[name], trace=NO_CALL, scratch=())]
            elif self._caches(name):  # another path through the layers, with another peak
                ways.append(self._footprint(name, own, cfg, SHALLOW))
            loaded = [*self.hardware.workspaces, *held]
            return max(peak(self.hardware.device, loaded, one, [*later, *features]) for one in ways)

        beside = tuple(
            (n, p.backend, p.provider, p.precision, p.compute, p.residency, p.kept_bytes, p.compiled)
            for n in others
            for p in [placements[n]]
        )
        graphs = tuple(
            kind for n in (name, *others) if placements[n].captured for kind in self._kinds(n, cfg)
        )
        way = (cfg, is_new, self._pictures(self._role(name)), self._caches(name), tuple(features), graphs)
        return self._once(("peak", name, own, beside, *way), compute)

    def _kept(self, name: str, placement: Placement, cfg: str) -> list[int]:
        """Bytes that its calls leave behind, as long as it is loaded: CUDA graphs of each kind of call."""
        if not placement.captured:
            return [self._footprint(name, placement, cfg).kept]
        return [self._footprint(name, placement, *way).kept for way in self._kinds(name, cfg)]

    def _features(self, name: str, placements: Mapping[str, Placement], cfg: str) -> list[int]:
        """Bytes of each array that is kept from step to step while a network is called, but for its own."""
        denoiser = self.spec.denoiser.name
        if self.step_cache == 1 or self._role(name) not in STEPPING:
            return []
        extent = self._extent(denoiser, cfg, SHALLOW)
        shape = self.spec.inputs(self.spec.denoiser, *extent).get(KEPT, (0,))
        kept_bytes = math.prod(shape) * (4 if placements[denoiser].compute == "fp32" else 2)
        calls = self.job.branches * self.images_per_call // extent.batch
        is_own = name == denoiser and not placements[denoiser].captured  # else a copy of what the graph has
        return [kept_bytes] * (calls - is_own)

    def _calling_seconds(self, cfg: str, placements: Mapping[str, Placement]) -> float:
        """With all that is needed loaded."""
        total = self._beside_seconds()
        for name in self._called(placements):
            placement, modes = placements[name], self._calls(name, cfg)
            for cache in CACHES if self._caches(name) else CACHES[:1]:
                for mode, calls in self._calls(name, cfg, cache).items():
                    one = ("seconds", name, placement, self._extent(name, mode, cache))
                    total += calls * self._once(
                        one,
                        lambda p=placement, n=name, m=mode, c=cache: call_seconds(
                            self.hardware, p, self._footprint(n, p, m, c)
                        ),
                    )
            if placement.backend in GRAPHS and all(modes.values()):
                total += (len(modes) - 1) * self._changing_seconds(self.spec.components[name], placement)
        return total

    def _preparing_seconds(
        self, placements: Mapping[str, Placement], footprints: Mapping[str, Footprint]
    ) -> tuple[float, float]:
        """To load what is not loaded yet, and to quantise it."""
        new = [
            name for name in self._called(placements) if (name, placements[name]) not in self.wishes.loaded
        ]
        parts = [(self.spec.components[name], placements[name], footprints[name]) for name in new]
        loading = sum(self._loading_seconds(*part) for part in parts)
        quantising = sum(
            self._for_one(placement, self._quantising_seconds(component, placement))
            for component, placement, _ in parts
        )
        return loading - quantising, quantising

    def _compiling_seconds(self, cfg: str, placements: Mapping[str, Placement]) -> float:
        """Of each kind of blocks that the denoiser's calls have. A pass before it was of another size."""
        name = self.spec.denoiser.name
        placement = placements[name]
        if not placement.compiled or placement.backend in GRAPHS:
            return 0.0
        kinds = (self._footprint(name, placement, *way).trace.kinds for way in self._kinds(name, cfg))
        return self._for_one(placement, compiling_seconds(self.hardware.device, sum(kinds)))

    def _kinds(self, name: str, cfg: str) -> list[tuple[str, str]]:
        """How a network is called, by guidance and cache: other inputs each."""
        caches = CACHES if self._caches(name) else CACHES[:1]
        return [(mode, c) for c in caches for mode, calls in self._calls(name, cfg, c).items() if calls]

    def _beside_seconds(self) -> float:
        """Of all pictures, what is not in a network."""
        job = self.job
        picture = PICTURE_SECONDS + PIXEL_SECONDS * job.width * job.height if job.share.decodes else 0.0
        return job.num_images * (picture + STEP_SECONDS * job.calls)

    def _changing_seconds(self, component: Component, placement: Placement) -> float:
        """To go over to another shape in each picture, and back."""
        if not graph_engine(placement.backend).for_one_shape:
            return 0.0
        return 2 * self.job.num_images * self._reading_seconds(component, placement)

    def painting_seconds(self, plan: Plan) -> float:
        """What a plan takes, but for previews."""
        seconds = plan.predicted.seconds
        for part in self.spec.of_role(Role.PREVIEW):
            if placement := plan.placements.get(part.name):
                footprint = self._footprint(part.name, placement, plan.cfg)
                seconds -= self.job.previews * call_seconds(self.hardware, placement, footprint)
                seconds -= self._loading_seconds(part, placement, footprint)
        return seconds

    def _is_called(self, name: str) -> bool:
        """Whether it is called at all: one of several passes has no use for some."""
        return any(self._calls(name, "sequential").values())

    def _is_loaded(self, name: str) -> bool:
        """Whether it is called in this pass, or in another by the same model."""
        idle = self.texts_known and self._role(name) is Role.TEXT
        return not idle and (self.job.whole.refiner is None or self._is_called(name))

    def _needed(self, placements: Mapping[str, Placement]) -> dict[str, Placement]:
        """All but text encoders whose texts are known."""
        return {n: p for n, p in placements.items() if not self.texts_known or self._role(n) is not Role.TEXT}

    def _called(self, placements: Mapping[str, Placement]) -> list[str]:
        return list(filter(self._is_called, placements))

    def _calls(self, name: str, cfg: str, cache: str = FULL) -> dict[str, float]:
        """How often a network is called, by how: "sequential" is one row of a batch. A last call for fewer
        pictures is a part of one. `cache` counts one kind of calls, where steps are cached."""
        job, branches, role = self.job, self.job.branches, self._role(name)
        if role is Role.PREVIEW:
            return {cfg: job.previews}
        if role not in STEPPING:
            texts = job.text_encodings if job.share.encodes and not self.texts_known else 0  # one by one
            pictures = job.num_images / self.images_per_decode if job.share.decodes else 0
            return {cfg: {Role.TEXT: texts, Role.ENCODER: job.encodings(name), Role.DECODER: pictures}[role]}
        calls, guided = job.calls_with(name)
        if self._caches(name):
            full = job.full_calls(self.step_cache, name)
            calls, guided = full if cache == FULL else (calls - full[0], guided - full[1])
        if branches == 1:
            guided = calls
        alone, times = (calls - guided) * len(job.prompted), job.num_images / self.images_per_call
        alone += job.skipping_calls * len(job.prompted) if role is Role.DENOISER else 0
        if cfg == "sequential" or not alone:
            return {cfg: (guided * (branches if cfg == "sequential" else 1) + alone) * times}
        return {cfg: guided * times, "sequential": alone * times}

    def _loading_seconds(self, component: Component, placement: Placement, footprint: Footprint) -> float:
        """For one request. What stays loaded, or pinned, is read once for all of them."""
        if placement.residency == "streamed":
            kept, pinned = _read_bytes(component) - footprint.stored, footprint.host
            converted = _converted(component, placement.compute) - footprint.converted
            loading = reading_seconds(self.hardware, kept, converted, placement.compute)
            loading += footprint.kept_patching_seconds + self._filling_seconds(
                component, placement, footprint
            )
            reading = footprint.stored / self.hardware.read + footprint.patching_seconds
            once = reading + pinned * PIN_SECONDS if pinned else 0.0
            return loading + once / self.wishes.requests
        loading = self._reading_seconds(component, placement) + footprint.patching_seconds
        loading += self._filling_seconds(component, placement, footprint)
        return self._for_one(placement, loading)

    def _filling_seconds(self, component: Component, placement: Placement, footprint: Footprint) -> float:
        tensors = len(component.tensors) - footprint.flowing
        return filling_seconds(self.hardware, placement, footprint, tensors, component.is_ordered(placement))

    def _for_one(self, placement: Placement, seconds: float) -> float:
        """Of one request's, what loading takes."""
        return seconds / (self.wishes.requests if placement.residency == "resident" else 1)

    def _quantising_seconds(self, component: Component, placement: Placement) -> float:
        """As it is loaded. What streams is not."""
        if (
            placement.precision not in QUANTISED
            or component.formats is not None
            or placement.backend in GRAPHS
            or placement.residency == "streamed"
        ):
            return 0.0
        made = _made_values(component, placement.precision)
        return sum(quantising_seconds(self.hardware, kind, *counts) for kind, counts in made.items())

    def _reading_seconds(self, component: Component, placement: Placement) -> float:
        if placement.backend in GRAPHS:
            graph = component.graph
            assert graph
            preparing = graph_engine(placement.backend).preparing_seconds(graph)
            return graph.stored_bytes / self.hardware.read + preparing
        compute, converted = placement.compute, _converted(component, placement.compute)
        loading = reading_seconds(self.hardware, _read_bytes(component), converted, compute)
        loading += self._quantising_seconds(component, placement)
        count = _count(component)
        if placement.precision == DYNAMIC and self.hardware.device == "cpu":
            loading += count * PACK_SECONDS
        if component.is_ordered(placement):
            size, order = 4 if compute == "fp32" else 2, self.hardware.moves.get(f"{compute}/order", math.inf)
            loading += size * count / order
        return loading

    def refusal(self, cfg: str, placements: Mapping[str, Placement]) -> str | None:
        """Why an engine cannot run its component so, or None."""
        if self.step_cache > 1 and self.spec.denoiser.network.call_cached is None:
            return "its denoiser keeps nothing from step to step: leave out --step-cache"
        unet = placements[self.spec.denoiser.name]
        if (unet.compiled or unet.captured) and unet.backend != "torch":
            return (
                "torch alone has its blocks compiled, and CUDA graphs: leave out --compile and --cuda-graphs"
            )
        if unet.captured and not self.job.prompting.is_even:
            return "prompt and negative prompt differ in length, CUDA graphs do not: leave out --cuda-graphs"
        if unet.captured and any(condition.varies(self.job) for condition in self.job.conditions):
            return (
                "a control acts in some steps or on one branch, and would take CUDA graphs for both kinds of "
                "calls: leave out --cuda-graphs, or let it act in all"
            )
        if self.job.skipping and (unet.captured or unet.backend in GRAPHS):
            return "a graph has all of its layers: leave out --skip-layers" + (
                ", or --cuda-graphs" if unet.captured else ""
            )
        needed = self._needed(placements)
        # What was asked for is the denoiser's, and the others follow it.
        for name in sorted(needed, key=lambda name: self._role(name) is not Role.DENOISER):
            component, placement = self.spec.components[name], needed[name]
            for mode, cache in product(self._calls(name, cfg), CACHES if self._caches(name) else CACHES[:1]):
                extent = self._extent(name, mode, cache)
                why = engine(placement.backend).refuses(
                    self.spec, component, placement, self.hardware, extent
                )
                if why:
                    return why
        return None

    def _verdict(
        self, cfg: str, placements: Mapping[str, Placement], predicted: Predicted, budget_bytes: int
    ) -> tuple[Verdict, str]:
        """Whether this plan can be taken, and the reason in words."""
        if refusal := self.refusal(cfg, placements):
            return Verdict.REFUSED, refused(refusal)
        if self.wishes.min_psnr is not None and predicted.psnr < self.wishes.min_psnr:
            return (
                Verdict.TOO_COARSE,
                f"is {predicted.psnr:.0f} dB from fp32, below the floor of {self.wishes.min_psnr:g}",
            )
        if problem := self._lack(predicted, budget_bytes):
            return Verdict.TOO_LARGE, problem
        return Verdict.FITS, "fits"

    def _lack(self, predicted: Predicted, budget_bytes: int) -> str | None:
        """What memory the plan needs and has not, or None."""
        room = budget_bytes - predicted.context_bytes
        if predicted.peak_bytes > room:
            stage = max(predicted.stages, key=lambda name: predicted.stages[name])
            beside = (
                f" beside the {shown(predicted.context_bytes)} of {holder(self.hardware)}"
                if room <= 0
                else ""
            )
            most = predicted.stages[stage]
            return f"needs {shown(most)} to {stage}{beside}, {shown(most - room)} too much"
        if predicted.host_bytes > self.hardware.host_bytes:
            return (
                f"needs {shown(predicted.host_bytes)} of the host's memory, "
                f"{shown(self.hardware.host_bytes)} are free"
            )
        return None


def _read_bytes(component: Component) -> int:
    tensors = *component.tensors.values(), *component.words.values()
    return component.once("read", lambda: read_bytes(tensors))


def _count(component: Component) -> int:
    return component.once("count", lambda: sum(tensor.count for tensor in component.tensors.values()))


def _converted(component: Component, compute: str) -> int:
    return component.once(
        ("converted", compute), lambda: converted_values(component.tensors.values(), compute)
    )


def _host_bytes(placements: Mapping[str, Placement], footprints: Mapping[str, Footprint]) -> int:
    """What is staged takes of the host one after another; what is pinned to stream from stays for the next
    picture."""
    staged = [
        footprints[name].host for name, placement in placements.items() if placement.residency == "staged"
    ]
    return sum(footprint.host for footprint in footprints.values()) - sum(staged) + max(staged, default=0)


def _kept_values(component: Component, precision: str) -> tuple[int, int]:
    """Of the values that are quantised in `precision`: how many keep the codes of the files, and all."""

    def counted() -> tuple[int, int]:
        quantised = [(tensor, form) for tensor, form in _forms(component, precision) if form]
        kept = [tensor.count for tensor, form in quantised if form == tensor.form]
        return sum(kept), sum(tensor.count for tensor, _ in quantised)

    return component.once(("kept", precision), counted)


def _made_values(component: Component, precision: str) -> Mapping[str, tuple[int, int]]:
    """Layers and values that are quantised at load, by int8 and int4: a layer may have more bits than
    `precision`."""

    def counted() -> dict[str, tuple[int, int]]:
        made: dict[str, tuple[int, int]] = {}
        for tensor, form in _forms(component, precision):
            if form and form != tensor.form:
                kind = f"int{bits_of(form)}"
                layers, values = made.get(kind, (0, 0))
                made[kind] = layers + 1, values + tensor.count
        return made

    return component.once(("made", precision), counted)


def _forms(component: Component, precision: str) -> Iterator[tuple[Tensor, str | None]]:
    """Each of the component's tensors, and the format that it is held in, None for a plain one."""
    kind = "int8" if precision == DYNAMIC else precision
    for name, tensor in component.tensors.items():
        layer, least = name.removesuffix(".weight"), component.network.least_bits
        stored = "" if precision == DYNAMIC else tensor.form
        yield tensor, recipe(kind, layer, tensor.shape, least, stored) if kind in STORED else None


def encodings(spec: ModelSpec, placements: Mapping[str, Placement]) -> list[str]:
    """A line for each encoding that files have a network's weights in, with what becomes of them."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for name, placement in placements.items():
        for tensor, form in _forms(spec.components[name], placement.precision):
            if tensor.encoding:
                kept = "kept as they are" if form == tensor.form else "decoded"
                again = f"{kept} and quantised again" if form and kept == "decoded" else kept
                counts[name, tensor.dtype, again] += 1
    return [
        f"{name}: {count} {'weight' if count == 1 else 'weights'} in {dtype}, {what}"
        for (name, dtype, what), count in counts.items()
    ]


def _psnr(component: Component, placement: Placement) -> float:
    """Errors of weights and of arithmetic add up, as independent noise does. Codes that files have are
    exact."""
    if placement.precision == placement.compute:
        return PSNR["packed" if placement.packed else placement.precision]
    kept, every = _kept_values(component, placement.precision)
    rounded = 1 - kept / every if every else 1.0
    shares = {placement.precision: rounded, placement.compute: 1.0}
    return -10 * math.log10(sum(share * 10 ** (-PSNR[each] / 10) for each, share in shares.items()))


def _summed(decibels: Sequence[float]) -> float:
    """Of errors that are independent of each other."""
    return -10 * math.log10(sum(10 ** (-each / 10) for each in decibels))
