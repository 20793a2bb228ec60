"""Every way to enlarge a picture by an upscaler: costed, and the fastest that fits first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..backends import engine
from ..budget import BUILDING
from ..costs.footprint import Footprint, peak
from ..costs.latency import call_seconds, read_bytes
from ..errors import TightfitError
from ..machine.hardware import Hardware
from ..models.families.family import Extent
from ..models.spec import Component, ModelSpec
from ..placement import CFG, COMPUTES, TILINGS, Placement
from ..units import shown
from .choose import beaten, budget_of
from .estimate import PSNR
from .plan import Plan, Predicted, Verdict, refused
from .wishes import Wishes

STAGE = "upscale"
Sizes = Sequence[tuple[int, int]]
"""Height and width of the picture that each pass through the network enlarges."""


@dataclass(frozen=True)
class _Case:
    """A picture and a machine. Weights are never quantised: the largest network has 33 MiB of them in 16
    bits, where a picture of 512x512 takes ten times as much."""

    hardware: Hardware
    spec: ModelSpec
    sizes: Sizes
    wishes: Wishes

    @property
    def component(self) -> Component:
        (component,) = self.spec.components.values()
        return component

    def plan(self, placement: Placement) -> Plan:
        component, budget = self.component, budget_of(self.hardware, self.wishes)
        run = engine(placement.backend)
        extents = [Extent(1, *size) for size in self.sizes]
        with BUILDING:
            footprints = [run.footprint(self.spec, component, placement, self.hardware, e) for e in extents]
            refusals = (run.refuses(self.spec, component, placement, self.hardware, e) for e in extents)
            refusal = next(filter(None, refusals), None)
        predicted = self._predicted(placement, footprints)
        verdict, reason = self._verdict(predicted, budget)
        if refusal:
            verdict, reason = Verdict.REFUSED, refused(refusal)
        return Plan(
            model=str(component.folder),
            hardware=self.hardware.name,
            device=self.hardware.device,
            budget_bytes=budget,
            cfg=CFG[0],
            guided=False,
            placements={component.name: placement},
            predicted=predicted,
            verdict=verdict,
            chosen=False,
            reason=reason,
        )

    def _predicted(self, placement: Placement, footprints: Sequence[Footprint]) -> Predicted:
        hardware = self.hardware
        peak_bytes = max(peak(hardware.device, hardware.workspaces, footprint) for footprint in footprints)
        loading = read_bytes(self.component.tensors.values()) / hardware.read
        seconds = sum(call_seconds(hardware, placement, footprint) for footprint in footprints) + loading
        stages, psnr = {STAGE: peak_bytes}, PSNR[placement.compute]
        context_bytes, host_bytes = hardware.context_bytes, footprints[0].host
        return Predicted(peak_bytes, stages, context_bytes, host_bytes, seconds, psnr, loading)

    def _verdict(self, predicted: Predicted, budget_bytes: int) -> tuple[Verdict, str]:
        floor, over = self.wishes.min_psnr, predicted.peak_bytes + predicted.context_bytes - budget_bytes
        if floor is not None and predicted.psnr < floor:
            return Verdict.TOO_COARSE, f"is {predicted.psnr:.0f} dB from fp32, below the floor of {floor:g}"
        if over > 0:
            return Verdict.TOO_LARGE, f"needs {shown(predicted.peak_bytes)}, {shown(over)} too much"
        return Verdict.FITS, "fits"


def _placements(hardware: Hardware, wishes: Wishes) -> Iterator[Placement]:
    for name in ("backend", "precision", "compute", "residency"):
        value, known = getattr(wishes, name), {"backend": ("torch",), "residency": ("resident",)}
        if value not in ("auto", *known.get(name, COMPUTES)):
            cure = f"choose auto, {', '.join(known.get(name, COMPUTES))}"
            raise TightfitError(f"an upscaler does not run with --{name} {value}: {cure}")
    asked = next((value for value in (wishes.precision, wishes.compute) if value != "auto"), None)
    tilings = TILINGS if wishes.tiling == "auto" else (wishes.tiling,)
    for precision, tiling in product([asked] if asked else hardware.precisions, tilings):
        yield Placement("torch", precision, precision, "resident", "sdpa", tiling)


def plans(
    hardware: Hardware, spec: ModelSpec, sizes: Sizes, wishes: Wishes, *, every: bool = True
) -> list[Plan]:
    """Best first: those that fit, fastest first, then the others by what they lack. Without `every`, strips
    are left out where the whole picture fits, which is always faster: to follow them takes seconds."""
    case = _Case(hardware, spec, sizes, wishes)
    found: list[Plan] = []
    for placement in _placements(hardware, wishes):
        known = (plan for plan in found if plan.fits and not every)
        if not any(plan.placements[case.component.name].compute == placement.compute for plan in known):
            found.append(case.plan(placement))
    fitting = sorted((plan for plan in found if plan.fits), key=_by_seconds)
    others = sorted((plan for plan in found if not plan.fits), key=lambda plan: plan.predicted.peak_bytes)
    if not fitting:
        return others
    best, *rest = fitting
    left = best.budget_bytes - best.predicted.context_bytes - best.predicted.peak_bytes
    praise = f"the fastest that fits, with {shown(left)} to spare"
    return [replace(best, chosen=True, reason=praise), *(beaten(plan, best) for plan in rest), *others]


def _by_seconds(plan: Plan) -> tuple[float, int]:
    return plan.predicted.seconds, plan.predicted.peak_bytes


def none_fits(found: Sequence[Plan], hardware: Hardware, sizes: Sizes) -> TightfitError:
    """The error that says what would do."""
    large = [plan for plan in found if plan.verdict is Verdict.TOO_LARGE]
    height, width = sizes[-1]
    said = f"a picture of {width}x{height} cannot be enlarged as asked"
    if not large:
        return TightfitError(f"{said}: {found[0].cause}")
    least = min(large, key=lambda plan: plan.predicted.peak_bytes)
    needed = least.predicted.peak_bytes + least.predicted.context_bytes
    option = "--ram" if hardware.device == "cpu" else "--vram"
    return TightfitError(
        f"{said} within {shown(least.budget_bytes)}: it takes {option} {-(-needed // 2**20)}MiB, "
        "a smaller picture, or a smaller network"
    )
